"""Downloads a checkpoint's files from the Hugging Face Hub into its cache and prints the folder.

    python scripts/download.py ORG/NAME[@REVISION]

Takes the safetensors, the configuration, the tokenizer and the licence, never pickled weights. Which files those are,
and what each failure means, is `input_folder.resolve`'s knowledge, which `--checkpoint` uses as well.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules are used from the checkout, not installed

from command_line import Parser, begin


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="download.py", description="Download a checkpoint and print its folder.")
    p.add_argument("checkpoint", metavar="ORG/NAME[@REVISION]", help="of the Hub")
    return p.parse_args(argv)


if __name__ == "__main__":
    begin(parse)  # before PyTorch is imported

from input_folder import resolve


def main() -> None:
    checkpoint = parse(None).checkpoint
    try:
        folder = resolve(checkpoint)
        if next(folder.glob("*.safetensors"), None) is None:
            raise FileNotFoundError(f"{checkpoint} holds no *.safetensors (other weight formats are not supported)")
    except FileNotFoundError as error:
        print(f"download.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(folder)


if __name__ == "__main__":
    main()
