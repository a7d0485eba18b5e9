"""Every name of LLaMA-Factory 0.9.5 that is swapped while a recipe with the plugin runs, and why."""

from __future__ import annotations

from . import api, data, export, model, training

# (module, name, maker of the replacement): the places where 0.9.5 has no extension point
SWAPS = (
    # the step: a training from recipe to adapter in one readable file, training/workflow.py
    ("llamafactory.train.tuner", "run_dpo", training.run_dpo),
    # the entry's own `llava_orpo` block and registry name are not kept by DatasetAttr
    ("llamafactory.data.loader", "get_dataset_list", data.keep_entries),
    # filter and held-out split come before max_samples; images must not be decoded or written again
    ("llamafactory.data.loader", "_load_single_dataset", data.sample_after_filter),
    ("llamafactory.data.loader", "align_dataset", data.align),
    # the prompt once per pair; skipped pairs counted and listed
    ("llamafactory.data.loader", "_get_preprocessed_dataset", data.tokenize),
    # vision tower and projector stay in 16 bit; tiles
    ("llamafactory.model.patcher", "configure_quantization", model.spare_vision),
    ("llamafactory.model.loader", "load_config", model.limit_config),
    ("llamafactory.model.loader", "patch_processor", model.limit_processor),
    # frozen weights in the dtype that the recipe asks for, not in the checkpoint's
    ("llamafactory.model.loader", "init_adapter", model.one_dtype),
    # published tensor names and the base model's own processor files on export
    ("llamafactory.train.tuner", "load_model", export.published_export),
    ("llamafactory.train.tuner", "load_tokenizer", export.untouched_tokenizer_files),
    # chat, webchat and api give answers as the model wrote them
    ("llamafactory.chat.hf_engine", "load_tokenizer", model.unedited_answers),
)

API_MODULE = "llamafactory.api.app"
# the same for `llamafactory-cli api`, which alone has loaded this module, and the web server with it
API_SWAPS = (
    # body, images and clients have limits; every error is in OpenAI's form
    (API_MODULE, "create_app", api.guarded_app),
    (API_MODULE, "uvicorn", api.patient_server),
)
