"""The command line of lm-evaluation-harness, which knows the model ``longnet`` here.

python -m longnet_dist.inference.harness.command run --model longnet --model_args pretrained=exported --tasks mine
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from longnet_dist.errors import USER_ERROR_STATUS, LongNetError
from longnet_dist.inference.harness.language_model import NAME, LongNetLM


def main() -> None:
    """Add the model to those of lm-evaluation-harness, then do what its command line says.

    Where transformers is installed, ``--model hf`` loads exported models, too. A mistake ends with one message and
    status 2.
    """
    import lm_eval.models  # noqa: F401 (registers its own models)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    # Releases that read the entry points of group lm_eval.models know it already.
    if NAME not in model_registry:
        model_registry.register(NAME, target=LongNetLM)
    if find_spec("transformers") is not None:
        import longnet_dist.hf  # noqa: F401 (registers the model type)
    try:
        cli_evaluate()
    except LongNetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    main()
