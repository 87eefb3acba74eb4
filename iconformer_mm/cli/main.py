"""Parameter-efficient fine-tuning for OpenMMLab and timm: train, test, predict, and look at what was trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from iconformer_mm.messages import hint
from iconformer_mm.version import __version__

# Name, module and description. The modules are imported when their command is called: some of them take seconds.
COMMANDS = {
    'train': ('train', 'train a model, with a PEFT method from the config or by --peft'),
    'test': ('test', 'test a checkpoint'),
    'predict': ('predict', 'predict on images with an adapter, and draw the predictions'),
    'serve': ('serve', 'serve the adapters of a folder over HTTP, from one base'),
    'inspect': ('inspect', 'show what a config would adapt, train and cost, before any training'),
    'adapter': ('adapter', 'show, extract, apply, compare and check adapter files'),
    'convert': ('convert', 'make an adapter file of an adapter that another program trained'),
    'convert-backbone': ('convert_backbone', 'make weights to pre-train from of a backbone that others published'),
    'fetch-real': ('fetch_real', 'fetch a real DINOv2-S for trials, about 90 MB'),
    'data': ('data', 'write sets of real images: digits, fashion, textiles, objects, a mixture'),
    'quickstart-real': ('quickstart_real', 'adapt a real DINOv2-S to images by four methods, and compare them'),
    'compare': ('compare', 'compare PEFT methods on several tasks, as a YAML file says'),
    'paper': ('paper', "run the benchmarks of the paper's scale: prepare, plan, train, test, and fill a table"),
    'report': ('report', 'write one HTML page about a training run or a comparison'),
    'find-lr': ('find_lr', 'find a learning rate to begin with'),
    'visualize-icon': ('visualize_icon', "show iCoN's kernels for images, and where the model looks"),
    'export-backbone': ('export_backbone', 'write the backbone of a checkpoint as weights to begin with'),
}


def usage() -> str:
    """What ``iconformer --help`` prints."""
    width = max(map(len, COMMANDS))
    commands = '\n'.join(f'  {name:<{width}}  {description}' for name, (_, description) in COMMANDS.items())
    return (
        f'usage: iconformer COMMAND [ARGUMENTS]\n\n{__doc__}\n\ncommands:\n{commands}\n\n'
        '`iconformer COMMAND --help` shows the arguments of a command; `iconformer --version` the version.\n'
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run a command.

    Args:
        argv: Name of the command, and its arguments. Defaults to the process's.

    Returns:
        The exit status: 2 for an unknown command, else that of the command; None is 0.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (given[0], given[1:]) if given else ('--help', [])
    if name in ('-h', '--help'):
        print(usage(), end='')
        return 0
    if name == '--version':
        print(f'iconformer_mm {__version__}')
        return 0
    if name not in COMMANDS:
        meant = hint(name, COMMANDS) or f'; there are: {", ".join(COMMANDS)}'
        print(f"error: unknown command '{name}'{meant}", file=sys.stderr)
        return 2
    sys.argv = [f'iconformer {name}', *arguments]  # argparse names the program by it
    return import_module(f'iconformer_mm.cli.{COMMANDS[name][0]}').main(arguments)
