"""Frozen Transformer teachers whose keys and queries are read layer by layer; no modelling code is copied."""
