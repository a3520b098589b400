"""Look at a dataset of trajectories, check it, count it, or convert it.

PATH is a JSON, JSONL, ArrayRecord or Parquet file, or a folder of them; records are in the native
schema or in ShareGPT.

  python -m launch.data validate data/train.jsonl
  python -m launch.data inspect data/train.jsonl --index=3 --conversation
  python -m launch.data inspect data/train.jsonl --step=2 --policy=text=instruction
  python -m launch.data stats data
  python -m launch.data convert data/train.jsonl data/train.array_record
  python -m launch.data prune outputs/drawings data/train.jsonl --vlm=FOLDER
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 refused or faults found."""
    options = _parser().parse_args(argv)
    from launch.runtime import readable_errors

    with readable_errors():
        return options.run(options)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m launch.data", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add = _verb(verbs, "inspect", "print a record as it is read", _inspect)
    which = add.__self__.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, default=0, help="which record, counted from 0")
    which.add_argument("--id", help="which record, by its id")
    add("--conversation", action="store_true", help="as the vision-language model is trained on it")
    add("--step", type=int, metavar="N", help="what the image model is given for image N, from 1")
    add(
        "--policy",
        metavar="NAME=VALUE,...",
        default="",
        help="how that is made: text=trajectory|instruction, references=all|chosen|last_k, "
        "last_k=K; or a policy's JSON",
    )
    add = _verb(verbs, "validate", "find every fault; exit with 1 if there are any", _validate)
    add("--full", action="store_true", help="decode every picture; otherwise headers are read")
    add("--threads", type=int, default=8, help="that look at images (default: 8)")
    add("--min_side", type=int, help="pixels an image's sides must have (default: 64)")
    add("--max_side", type=int, help="pixels a side may have (default: 8192)")
    add("--max_area", type=int, help="pixels an image may have in all (default: 2**25)")
    add("--max_aspect", type=float, help="longer side over the shorter, at most (default: 8)")
    _verb(verbs, "stats", "count records, steps, words, image sizes, references", _stats)
    add = _verb(verbs, "convert", "write the records to another file", _convert)
    add("target", metavar="TARGET", type=Path, help="to create: NAME.jsonl or NAME.array_record")
    add(
        "--to",
        choices=("native", "conversations", "messages"),
        default="native",
        help="schema of the records; conversations and messages are ShareGPT's two variants",
    )
    add("--copy_images", action="store_true", help="JSONL: write image files beside it too")
    add("--paths", action="store_true", help="ArrayRecord: name image files, do not pack them")
    add = _verb(verbs, "prune", "keep what ended well, without steps that led nowhere", _prune)
    add("target", metavar="TARGET", type=Path, help="to create: NAME.jsonl, images beside it")
    add("--vlm", help="model that tells the stories anew; teacher: the miniature's scripted one")
    add(
        "--verify",
        action="store_true",
        help="it also checks each picture against what its step asked for; image SFT leaves out "
        "those that fail",
    )
    add("--max_steps", type=int, default=8, help="leave out what is longer (default: 8)")
    return parser


def _verb(verbs, name: str, text: str, run):
    parser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="PATH", help="a dataset file, or a folder of them")
    parser.add_argument("--split", help="of a folder, only the files called like it, e.g. train")
    return parser.add_argument


def _inspect(options: argparse.Namespace) -> int:
    from clvr_jax.data.sources import open_source
    from launch import data_show

    policy = data_show.parse_policy(options.policy)
    source = open_source(options.path, options.split)
    index = data_show.find(source, options.index, options.id)
    made = source[index]
    if options.step is not None:
        data_show.show_condition(made, options.step, policy)
    elif options.conversation:
        data_show.show_conversation(made)
    else:
        data_show.show_record(made, source.where(index))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from clvr_jax.data.images import Limits
    from clvr_jax.data.validate import validate
    from launch.data_show import progress_line

    names = ("min_side", "max_side", "max_area", "max_aspect")
    given = {name: getattr(options, name) for name in names}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    with progress_line("validating") as progress:
        report = validate(
            options.path, options.split, limits, options.full, options.threads, progress
        )
    for fault in report.faults:
        print(fault)
    print(report.summary(), file=sys.stderr if report.faults else sys.stdout)
    return 1 if report.faults else 0


def _stats(options: argparse.Namespace) -> int:
    from clvr_jax.data.sources import open_source
    from launch.data_show import show_stats

    show_stats(open_source(options.path, options.split))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from clvr_jax.data.sources import open_source
    from clvr_jax.data.writers import write_array_record, write_jsonl
    from launch.data_show import counted

    suffix = options.target.suffix.lower()
    if suffix not in (".jsonl", ".array_record", ".arrayrecord"):
        raise ValueError(f"{options.target}: the name must end in .jsonl or .array_record")
    if options.copy_images and suffix != ".jsonl":
        raise ValueError("--copy_images is for JSONL; ArrayRecord holds the images itself")
    if options.paths and suffix == ".jsonl":
        raise ValueError("--paths is for ArrayRecord; JSONL always names its images")
    source = open_source(options.path, options.split)
    with counted(source, "converting") as trajectories:
        if suffix == ".jsonl":
            count = write_jsonl(options.target, trajectories, options.to, options.copy_images)
        else:
            count = write_array_record(
                options.target, trajectories, options.to, embed=not options.paths
            )
    print(f"wrote {count} records to {options.target}")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from clvr_jax.data.sources import open_source
    from clvr_jax.data.writers import write_jsonl
    from launch.data_prune import Pruned, looker
    from launch.data_show import counted

    if options.target.suffix.lower() != ".jsonl":
        raise ValueError(f"{options.target}: the name must end in .jsonl")
    path = Path(options.path)
    if (path / "trajectories.jsonl").exists():  # of launch.generate
        path /= "trajectories.jsonl"
    source = open_source(path, options.split)
    with looker(options.vlm, options.verify) as look, counted(source, "pruning") as trajectories:
        kept = Pruned(trajectories, options.max_steps, look)
        count = write_jsonl(options.target, kept, copy_images=True)
    if not count:
        options.target.unlink()
        raise ValueError(f"nothing is left of {path}: {kept.summary()}")
    print(f"wrote {count} records to {options.target}; {kept.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
