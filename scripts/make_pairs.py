"""Preference pairs out of a model's own answers to a recipe's prompts: sampled, scored, paired.

    python scripts/make_pairs.py recipes/llava16_orpo_qlora.yaml adapter_name_or_path=outputs/llava16_orpo_qlora
    python scripts/make_pairs.py recipes/llava16_orpo_qlora.yaml dataset=coco scoring=objects annotations=instances.json
    python scripts/make_pairs.py recipes/llava16_orpo_qlora.yaml base_url=http://127.0.0.1:8000/v1 scoring=judge ...

Takes a recipe and overrides like llamafactory-cli. The prompts are those of its `dataset`, each (image, question) once;
the model is the recipe's, with adapter_name_or_path= for an aligned one. A batch holds per_device_eval_batch_size
prompts with all their answers. Own keys:

    out              where to write (default outputs/pairs/<model>)
    name             the pairs' name in dataset_info.json (default: the folder's)
    answers          8 answers to each prompt, sampled with the recipe's `seed`
    max_prompts      maximum number of prompts: all those of an image, the images spread evenly over the set
    max_new_tokens   512; an answer that has no end by then is left out
    temperature 0.7, top_p 1.0
    margin           0.0: how much higher the chosen answer must score
    length_ratio     2.0: the longer answer has at most so many times the tokens of the shorter one
    pairs_per_image  8 pairs of one image at most, over all its prompts
    allow_failed     true: end well although a server gave no answer about some prompts; they are counted
    restart          true: sample and score again what an interrupted or earlier run has

    scoring          self (default), judge or objects
      self           mean log-prob per token of the aligned model minus that of its base, in nats (RLAIF-V's
                     self-feedback, arXiv 2405.17220). reference: `base` (default), or an earlier adapter
      judge          the judge of evals/judge.py: judge_url, judge_model, judge_key_env (OPENAI_API_KEY), criteria,
                     judge_request, price_in, price_out, yes, as there. Each answer is compared in both orders with the
                     next `opponents` (2); score = (won - lost) / comparisons
      objects        minus the share of named objects that the image does not show (CHAIR, arXiv 1809.02156);
                     annotations= is COCO's instances_*.json, JSON {image: [object]}, or lines {image_hash, objects} or
                     {image, objects}; an image is named by its file name or content hash. vocabulary: JSON
                     {object: [other names]} (default: COCO's for COCO's annotations)

With base_url= an OpenAI-compatible server answers (vLLM with prefix caching runs an image and its prompt once), with
model, api_key_env, concurrency, timeout, retries and request as in evals/generate.py. scoring=self still loads the
model here.

Writes pairs.parquet (RLAIF-V's schema, the images' original bytes), dataset_info.json (which registers it beside the
recipe's own datasets), answers.jsonl (every answer with its score), left_out.jsonl and pairs.json (the counts). It may
be stopped at any moment: the same command goes on.
"""

from __future__ import annotations

import sys

from llava_orpo.pairs.options import OWN_KEYS, check
from llava_orpo.recipe import MODEL, read_command, run


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, uses=(*MODEL, "dataset"))
    check(command.own, command.given_keys, command.recipe.get("adapter_name_or_path"))
    from llava_orpo.pairs import making

    summary = making.make(command.recipe, command.own)
    making.print_summary(summary)
    for reason, count in summary["failed"]:
        print(f"{count} prompts got no answer, run the command again to ask them: {reason}", file=sys.stderr)
    return 1 if summary["failed"] and not command.own["allow_failed"] else 0


if __name__ == "__main__":
    run(main)
