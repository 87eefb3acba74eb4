"""Public names stay, and are documented."""

import importlib
import inspect
from pathlib import Path

import pytest
from conftest import ROOT

from iconformer_mm.registry import PEFT_METHODS

# What docs/api.md calls stable. Names may be added; one goes by the steps of docs/deprecation.md.
STABLE = {
    'iconformer_mm': """__version__ active_adapter add_adapter datasets delete_adapter disabled engine inject
        list_adapters load_adapter merge mixed models remove save_adapter set_adapter summarize unmerge""",
    'iconformer_mm.checkpoint': """AdapterFileError DamagedFileError base_difference base_of base_parameters
        describe_adapter describe_base fingerprint hash_parameters initialise_base load_adapter load_safetensors
        parse_adapter put_adapter read_adapter read_safetensors same_base save_adapter save_safetensors
        write_adapter""",
    'iconformer_mm.engine': """AdapterCheckpointHook AdapterStatisticsHook BFloat16OptimWrapper CheckedRunner PEFTHook
        PEFTOptimWrapperConstructor WeightsHook add_peft build_runner leave_process_group load_config""",
    'iconformer_mm.inference': 'AdapterInferencer draw_prediction',
    'iconformer_mm.ops': 'dynamic_depthwise_conv2d dynamic_depthwise_conv_tokens filter_norm',
}
REGISTERED = {
    ('mmengine', 'HOOKS'): 'AdapterCheckpointHook AdapterStatisticsHook PEFTHook WeightsHook',
    ('mmengine', 'OPTIM_WRAPPERS'): 'BFloat16OptimWrapper',
    ('mmengine', 'OPTIM_WRAPPER_CONSTRUCTORS'): 'PEFTOptimWrapperConstructor',
    ('mmengine', 'RUNNERS'): 'CheckedRunner',
    ('mmpretrain', 'DATASETS'): 'Digits SVHN Strokes',
    ('mmpretrain', 'MODELS'): """ICoNSwinTransformer ICoNSwinTransformerV2 ICoNTIMMBackbone ICoNVisionTransformer""",
    ('mmdet', 'MODELS'): 'ICoNSwinTransformer',
    ('mmseg', 'MODELS'): 'DepthDeconvHead ICoNSwinTransformer ICoNTIMMBackbone ICoNVisionTransformer',
}
METHODS = 'adapter adaptformer bitfit convpass dora frozen full icon icon-static lora lorand mona norm partial ssf vpt'
PACKAGES = sorted(
    '.'.join(path.parent.relative_to(ROOT).parts)
    for path in Path(ROOT, 'iconformer_mm').rglob('__init__.py')
    if '__all__' in path.read_text(encoding='utf-8')
)


@pytest.mark.parametrize('package', STABLE)
def test_stable_names_stay(package):
    module = importlib.import_module(package)
    assert set(STABLE[package].split()) - set(module.__all__) == set()


@pytest.mark.parametrize(('package', 'kind'), REGISTERED)
def test_registered_names_stay(package, kind):
    registry = getattr(importlib.import_module(f'{package}.registry'), kind)
    registry.import_from_location()
    found = {n for n, c in registry.module_dict.items() if c.__module__.partition('.')[0] == 'iconformer_mm'}
    assert set(REGISTERED[package, kind].split()) - found == set()


def test_methods_stay():
    assert set(METHODS.split()) - set(PEFT_METHODS.module_dict) == set()


@pytest.mark.parametrize('package', PACKAGES)
def test_all_names_have_docstrings(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), name
