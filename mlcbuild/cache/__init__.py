"""The content-addressed store and the action cache: what decides whether anything has to be built."""
