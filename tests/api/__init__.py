"""The HTTP contract, held against a real Redis and a real S3 server."""
