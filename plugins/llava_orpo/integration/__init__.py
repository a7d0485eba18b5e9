"""The only package that touches LLaMA-Factory's names. Written for and checked against llamafactory 0.9.5.

Official extension points used: register_template, register_mm_plugin, register_dataset_converter. What 0.9.5 has
no extension point for is swapped by name while a recipe with `plugins: llava_orpo` runs, and put back by
`deactivate`: see `_swaps`, which names every place and why.
"""
