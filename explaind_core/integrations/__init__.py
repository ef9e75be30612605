"""Thin layers over :class:`explaind_core.Recorder` for training frameworks.

``huggingface`` and ``lightning`` are imported by name: neither library is needed by the core.
"""
