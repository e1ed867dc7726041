"""ZIP archives: names, layout and bytes; pure computation and streaming, no S3 or Redis client."""
