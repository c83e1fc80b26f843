"""YAML files in, validated and resolved recipes out."""
