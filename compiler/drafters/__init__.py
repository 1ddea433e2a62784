"""Drafters that read the target's hidden states: DeepSpec's checkpoints (arXiv:2607.05147) to ONNX.

`checkpoint` recognises them by their fields, `dspark` and `eagle3` are their forward passes in plain torch (eagerly the
reference, traced the graphs), `build` plans and writes the directory `draft-KIND/` of an artifact.
"""
