"""Owns the purchases database: records the tills' sales and reads them back over gRPC."""
