"""Does a server say what transformers says? Prompts, answers and log-probs of held-out pairs, and why they differ.

    python evals/serve_parity.py recipes/llava16_orpo_qlora.yaml reference=outputs/llava16_orpo_merged \\
        base_url=http://127.0.0.1:8000/v1
    python evals/serve_parity.py recipes/tiny/llava16_orpo_qlora.yaml reference=outputs/tiny/orpo_qlora \\
        base_url=http://127.0.0.1:8000/v1 model=orpo_qlora max_rows=400

Takes a recipe and overrides like llamafactory-cli, and any OpenAI-compatible server that accepts images: vLLM
(scripts/serve.sh), `llamafactory-cli api`, llama-server, SGLang. The pairs are those of the recipe's eval_dataset. The
reference is the recipe's model in the recipe's precision (bf16=true, bf16=false), and not quantized to 4 bits unless
quantization_bit is given here. Own keys:

    base_url        the server, with /v1
    model           its name there (default: the only one)
    reference       what the server serves: `base`, an adapter folder, a model folder or Hub id (default: the recipe's)
    max_rows        20, spread evenly over the set
    max_new_tokens  128
    tolerance       worst difference of a token's log-prob, in nats, that counts as equal (default: by the precision)
    api_key_env     name of the environment variable with the key (default OPENAI_API_KEY)
    concurrency 1, timeout 600 (seconds), retries 3
    output_dir      where to write (default outputs/evals/<reference>-served)
    restart         true: ask again what an interrupted run has asked

Prompt token counts and greedy answers are compared on every server, prompt ids and log-probs where it returns them
(vLLM; SGLang's log-probs by its documentation, not run). They also give the served model's preference accuracy, by the
code of evals/preference.py. Writes serve_parity.json and, with log-probs, preference_pairs.jsonl. The exit code
is 1 if anything differs. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import model_label, read_command, run, with_model

OWN_KEYS = {
    "base_url": str,
    "model": str,
    "reference": str,
    "max_rows": 20,
    "max_new_tokens": 128,
    "tolerance": float,
    "api_key_env": "OPENAI_API_KEY",
    "concurrency": 1,
    "timeout": 600.0,
    "retries": 3,
    "restart": False,
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, required=("base_url",))
    recipe, own = command.recipe, command.own
    if own["reference"]:
        recipe = with_model(recipe, own["reference"])
    if not command.given("quantization_bit"):
        recipe.pop("quantization_bit", None)
    from llava_orpo.serving import parity
    from llava_orpo.serving.client import Server

    server = Server(own["base_url"], own["api_key_env"], own["concurrency"], own["timeout"], own["retries"])
    given_output = command.given("output_dir")
    folder = Path(recipe["output_dir"] if given_output else f"outputs/evals/{model_label(recipe)}-served")
    report = parity.check(
        recipe,
        server,
        own["model"],
        folder,
        own["max_rows"],
        own["max_new_tokens"],
        own["tolerance"],
        own["restart"],
    )
    print(parity.table(report))
    print(f"  {folder / parity.REPORT}")
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    run(main)
