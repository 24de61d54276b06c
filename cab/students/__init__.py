"""Mamba students: models that return B and C of every layer beside their output."""
