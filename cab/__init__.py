"""Cross-architecture distillation via Attention Bridge (arXiv:2510.19266): a Transformer teaches a Mamba student."""
