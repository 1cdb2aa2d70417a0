"""Lifting ONNX to the native dialect by abstract interpretation.

``axes`` knows how a tensor's axes relate to batch, token and feature; ``values`` is what is known of a value;
``lifter`` walks the graph; ``rules_*`` hold one transfer function per ONNX operator; ``regions`` and ``probe``
recognise functions by evaluating them.
"""
