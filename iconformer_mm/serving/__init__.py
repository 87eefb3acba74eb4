"""Serving the adapters of a folder over HTTP. It needs the extra ``[ray]``."""
