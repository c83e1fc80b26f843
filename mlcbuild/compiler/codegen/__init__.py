"""Code for GPUs and their hosts: device compilers, static archives, libraries."""
