"""Everything about a training that can be known before it starts, as a table, with an exit code.

    python scripts/check.py recipes/llava16_orpo_qlora.yaml
    python scripts/check.py recipes/tiny/llava16_orpo_qlora.yaml cutoff_len=1024

Takes a recipe and overrides like llamafactory-cli. Looks at keys, values and files, versions, the W&B login, the model
folder and its template, image tokens against cutoff_len, the data after filters, the computed memory against the
visible GPU, disk, and one decoded batch. No weight is loaded, and no weight or data is downloaded; the Hub is asked
whether it has what is not on this machine. Each line is ok, warning or error; what to do stands under it. The exit code
is 2 if there is an error, else 0. `llamafactory-cli train` makes the cheap checks (keys, values, files, precision) by
itself. It has no own keys.
"""

from __future__ import annotations

import os

from llava_orpo.recipe import read_command, run


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, {}, refuse=False)
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")  # read when LLaMA-Factory is imported
    from llava_orpo.plan import check

    found = []
    for line in check.lines(command.recipe):
        found.append(line)
        print(f"{line.state:<8}{line.what:<16}{line.found}", flush=True)
        if line.remedy:
            print(f"{'':<8}{'':<16}-> {line.remedy}", flush=True)
    errors = sum(line.state == check.ERROR for line in found)
    warnings = sum(line.state == check.WARNING for line in found)
    print(f"{errors} errors, {warnings} warnings")
    return 2 if errors else 0


if __name__ == "__main__":
    run(main)
