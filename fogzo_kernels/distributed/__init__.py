"""Models over several processes: FSDP2, tensor parallelism, and the group that trains together."""
