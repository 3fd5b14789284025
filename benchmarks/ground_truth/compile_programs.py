"""Compile RASP programs to transformer weights with tracr, and keep the weights as plain arrays.

Runs in an environment of its own (tracr needs jax and haiku; npeff is not needed):

    python -m venv tracr && tracr/bin/pip install tracr-pypi
    tracr/bin/python benchmarks/ground_truth/compile_programs.py programs.npz
"""

import json
import sys

import numpy as np
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

VOCABULARY = list("abcdef")
LENGTH = 6


def neighbour(offset):
    """The token ``offset`` places to the left (negative: right)."""
    select = rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - offset)
    return rasp.Aggregate(select, rasp.tokens, default=None).named(f"neighbour_{offset}")


def following(token):
    """The next letter of the alphabet."""
    return VOCABULARY[(VOCABULARY.index(token) + 1) % len(VOCABULARY)]


def programs():
    """Name → program. The branch is decided by the token at the place itself."""
    left, count = neighbour(1), lib.make_hist()
    return {
        "left or next letter": rasp.SequenceMap(
            lambda t, p: p if t in "abc" else following(t), rasp.tokens, left
        ).named("out"),
        "left, next letter or itself": rasp.SequenceMap(
            lambda t, p: p if t in "ab" else following(t) if t in "cd" else t, rasp.tokens, left
        ).named("out"),
        "left or count": lib.make_nary_sequencemap(
            lambda t, p, h: p if t in "abc" else str(h), rasp.tokens, left, count
        ).named("out"),
    }


def main() -> None:
    arrays = {}
    for name, program in programs().items():
        model = compiling.compile_rasp_to_model(rasp.categorical(program), set(VOCABULARY), LENGTH, compiler_bos="BOS")
        config = model.model_config
        labels = model.residual_labels
        outputs = model.output_encoder.encoding_map
        own = [label for label in labels if label.startswith("out")]
        meta = {
            "layers": config.num_layers,
            "heads": config.num_heads,
            "key_size": config.key_size,
            "tokens": {str(token): int(i) for token, i in model.input_encoder.encoding_map.items()},
            "outputs": {str(value): int(i) for value, i in outputs.items()},
            "residual": labels,
            "own": own,
        }
        arrays[f"{name}|meta"] = np.array(json.dumps(meta))
        for module, values in model.params.items():
            for part, value in values.items():
                arrays[f"{name}|{module}|{part}"] = np.asarray(value, np.float32)
        sample = list("abcdef")
        print(name, "layers", config.num_layers, "heads", config.num_heads, "width", len(labels), file=sys.stderr)
        print(sample, "→", model.apply(["BOS", *sample]).decoded, file=sys.stderr)
    np.savez(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
