"""Makes the manifest that data.source names: which shards a set of images has, with counts, blocks and checksums.

SOURCE is a folder or pattern of Parquet, Arrow or tar (WebDataset) shards, a folder with a folder of images for each
class, both also on gs://, or hf:OWNER/NAME for a data set of the Hugging Face Hub. Nothing is copied. --reshard writes
the images again beside the manifest, shuffled, in shards that a bucket serves well; the same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """``manifest num_images num_classes num_shards gib largest_block``."""
    from rae_xla.data.preparing import prepare

    result = prepare(arguments)
    print(
        f"{result['manifest']}: {result['num_images']} images of {result['num_classes']} classes in "
        f"{result['num_shards']} shards, {result['gib']:.2f} GiB"
    )
    return result


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--out", metavar="FILE", required=True, help="the manifest, as gs://bucket/imagenet/train.json")
    parser.add_argument("--split", default="train", help="of a data set of the Hub (default: train)")
    parser.add_argument("--image-column", metavar="NAME", help="or suffix in tar files (default: the first usual name)")
    parser.add_argument(
        "--label-column", metavar="NAME", help="the same for labels; json#key for a key of a tar's JSON members"
    )
    parser.add_argument("--num-classes", metavar="N", type=int, help="default: the largest label and one")
    parser.add_argument("--reshard", action="store_true", help="write the images again, beside the manifest")
    parser.add_argument(
        "--images-per-shard", metavar="N", type=int, default=4096, help="with --reshard (default: 4096)"
    )
    parser.add_argument("--images-per-block", metavar="N", type=int, default=64, help="with --reshard (default: 64)")
    parser.add_argument(
        "--short-side", metavar="PIXELS", type=int, help="with --reshard: scale larger images down, as JPEG"
    )
    parser.add_argument("--quality", metavar="Q", type=int, default=95, help="of those JPEG files (default: 95)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling (default: 0)")
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=8, help="so many at once, and processes of --reshard (default: 8)"
    )
    cli.run(main, parser)
