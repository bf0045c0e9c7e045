"""What ran, where and how well: records for a tracking server."""
