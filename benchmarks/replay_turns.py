"""What each turn of SEEKR's loop over heads adds to a replay step on TPUs, counted in the compiled programs.

    pip install 'jaxcl[plan]'
    python -m benchmarks.replay_turns [--topology v5e:2x4] [--layers 4]

Prints one JSON object: memory traffic and operations of the replay step as multiples of the plain step's, by the number
of turns a layer. LLaMA-2-7B's layers, rows of 2048 tokens, one a chip, params split over all chips; few layers, because
each costs the same. How often the loop turns depends on the heads that a batch's rows have selected; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os

TURNS = (1, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # planned for chips that are not here
    from jaxcl.config import load_config
    from jaxcl.planning.cost import count_cost
    from jaxcl.planning.hardware import parse_topology
    from jaxcl.planning.hlo import parse
    from jaxcl.planning.plan import programs, topology_mesh
    from jaxcl.planning.step import compile_with_text

    chips = parse_topology(options.topology).chips
    overrides = (
        f"data.prompt_length=1536 training.accumulate=1 training.batch_size={chips} mesh.fsdp={chips} "
        f"model.compute.kernel=splash model.num_layers={options.layers} method.layer_budget={options.layers - 1} "
        f"method.head_budget={4 * options.layers}"
    )
    config = load_config("configs/seekr_llama2_7b_trace.yaml", overrides.split())
    found = programs(config, topology_mesh(config, parse_topology(options.topology))[0])
    plain, replay = (parse(compile_with_text(found[name].lower())[1]) for name in ("train", "replay"))
    base = count_cost(plain, causal=True)
    costs = {turns: count_cost(replay, causal=True, loop_trips=turns) for turns in TURNS}
    result = {
        turns: {"bytes": round(cost.bytes / base.bytes, 4), "flops": round(cost.flops / base.flops, 5)}
        for turns, cost in costs.items()
    }
    print(json.dumps({"topology": options.topology, "layers": options.layers, "by_turns": result}, indent=1))


if __name__ == "__main__":
    main()
