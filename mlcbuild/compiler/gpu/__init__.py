"""Libraries for GPUs: relax operations, schedules, TVM's paged KV cache, sampling, code generators."""
