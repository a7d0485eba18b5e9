"""The only package that knows the names of LLaMA-Factory 0.9.5 that are swapped (`swaps.SWAPS`).

They are swapped while a recipe with `plugins: llava_orpo` runs, and put back by `run.deactivate`.
"""
