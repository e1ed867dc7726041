"""Everything S3."""
