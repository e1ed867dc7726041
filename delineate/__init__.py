"""delineate: many stored files in, one ZIP and a presigned URL out, in the background."""

__version__ = "0.1.0"
