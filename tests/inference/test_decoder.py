"""A step of a decoder can be replayed: it does the same to the same tensors, whatever the texts."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longnet_dist.errors import ConfigError
from longnet_dist.inference import decoder as decoder_module
from longnet_dist.inference.decoder import CHUNK_LENGTH, Decoder, prompt_rows
from longnet_dist.inference.generation import Sampling, generate
from tests.inference.test_generation import unaligned_model

FIELDS = [{}, {"kv_heads": 2, "positions": "rope", "head_offsets": "blocked", "qk_norm": True},
          {"layer_offsets": True, "layer_shift": True, "ffn": "gated"}, {"positions": "none"}]  # fmt: skip
PROMPTS = [[1], list(range(7)), [3] * 29, list(range(90))]


class Replayed:
    """Stands in for the CUDA graph: records the operations of one call, and later calls repeat exactly those.

    Numbers of the host are baked into the record, as they are into kernels' arguments, and tensors from outside are
    kept by reference.
    """

    made = 0

    def __init__(self, function, warm_up, device):
        self.function, self.warm_up, self.recorded, self.result = function, warm_up, None, None

    def __call__(self):
        if self.recorded is None:
            Replayed.made += 1
            self.warm_up()
            kept = []

            def first():
                kept.append(self.function())
                return kept[0]

            self.recorded = make_fx(first)()  # which runs it once, as a capture with its first replay does
            self.result = kept[0].clone()
        else:
            self.result.copy_(self.recorded())
        return self.result


def texts_of(decoder, steps):
    """Greedy ids of all places, in which texts come and go between the steps."""
    for place, prompt in enumerate(PROMPTS):
        decoder.load(prompt, [place])
    found = []
    for step in range(steps):
        if step == 40:
            decoder.clear(1)
        if step == 60:
            decoder.load([5] * 33, [1, 3])  # one of them replaces a text
        logits = decoder.step()
        found.append(logits.clone())
        decoder.follow(logits.argmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_replayed_step_computes_the_plain_one(monkeypatch, fields):
    """Over ends of segments of all branches, to the last bit, from the record of the first step alone."""
    model, allowed = unaligned_model(**fields), torch.arange(97) % 5 != 2
    expected = texts_of(Decoder(model, len(PROMPTS), 500, allowed=allowed), 320)
    monkeypatch.setattr(decoder_module, "Graph", Replayed)
    made = Replayed.made
    actual = texts_of(Decoder(model, len(PROMPTS), 500, allowed=allowed, graphs=True), 320)
    assert Replayed.made == made + 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Lists the operations of a step: names, numbers, and where tensors lie that the step did not make."""

    def __init__(self):
        super().__init__()
        self.found, self._made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = {tensor.untyped_storage().data_ptr() for tensor in self._made}

        def plain(tensor):
            pointer = tensor.untyped_storage().data_ptr()
            return "made", tensor.shape, tensor.dtype, None if pointer in made else tensor.data_ptr()

        self.found.append((str(func), str(tree_map_only(torch.Tensor, plain, (args, kwargs)))))
        result = func(*args, **(kwargs or {}))
        outside = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        self._made += [
            leaf for leaf in tree_leaves(result)
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in outside - made
        ]  # fmt: skip
        return result


def test_all_steps_do_the_same_to_the_same_tensors():
    """Also where segments end and after texts have come and gone."""
    model = unaligned_model(kv_heads=2)
    decoder = Decoder(model, 2, 500)
    decoder.load([1, 2, 3], [0])
    lists = []
    for step in range(110):
        if step == 50:
            decoder.load(list(range(60)), [1])
        if step == 70:
            decoder.clear(0)
        if step == 90:
            decoder.load([4], [0])
        with Operations() as operations:
            logits = decoder.step()
        decoder.follow(logits.argmax(-1))
        lists.append(operations.found)
    assert len(lists[0]) > 100
    assert all(found == lists[0] for found in lists)


def test_a_decoder_with_graphs_gives_the_same_tokens(monkeypatch):
    model = unaligned_model()
    expected = list(generate(model, PROMPTS[:2], 60, Sampling(seed=3)))
    plain = decoder_module.Decoder.__init__
    monkeypatch.setattr(decoder_module.Decoder, "__init__", lambda *given: plain(*given, graphs=True))
    assert list(generate(model, PROMPTS[:2], 60, Sampling(seed=3))) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize("fields", [*FIELDS[:3], {"kv_heads": 1}, {"kv_heads": 2, "sinks": True}], ids=str)
def test_split_keys_give_the_same_logits(fields):
    pytest.importorskip("triton")
    decoders = [Decoder(unaligned_model(**fields).float(), 2, 200) for _ in range(2)]
    decoders[1]._cache.split_keys = True
    for decoder in decoders:
        decoder.load([1, 2, 3], [0])
        decoder.load(list(range(90)), [1])
    for _ in range(12):
        logits = [decoder.step() for decoder in decoders]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        for decoder in decoders:
            decoder.follow(logits[0].argmax(-1))


def test_split_keys_are_refused_where_their_kernels_do_not_run():
    with pytest.raises(ConfigError, match=r"split_keys=True needs Triton, and a GPU .* not torch.float64 on cpu"):
        Decoder(unaligned_model(), 1, 100, split_keys=True)


def test_a_decoder_on_a_cpu_has_neither_graphs_nor_kernels():
    decoder = Decoder(unaligned_model().float(), 1, 100)
    assert decoder._step == decoder._pass
    assert not decoder._cache.split_keys


@pytest.mark.parametrize(
    ("free", "rows"), [(130 * 2**30, 2**18), (24 * 2**30, 2**16), (2**20, CHUNK_LENGTH)], ids=["H200", "24 GiB", "full"]
)
def test_prompts_take_the_free_memory_of_a_gpu(monkeypatch, free, rows):
    """A quarter, as rows of a power of two, whose numbers torch's kernels can count."""
    numbers = {"mem_get_info": (free - 2**19, 0), "memory_reserved": 2**20, "memory_allocated": 2**19}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    model = SimpleNamespace(parameters=lambda: iter([weight]), config=SimpleNamespace(dim=768, first_dim=3072))
    assert prompt_rows(model) == rows
    assert prompt_rows(unaligned_model()) == CHUNK_LENGTH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", [{}, {"kv_heads": 1}, {"kv_heads": 2, "sinks": True}], ids=str)
def test_by_default_a_gpu_has_graphs_and_our_kernels(fields):
    model = unaligned_model(**fields).float().cuda()
    plain = Decoder(model, len(PROMPTS), 500, graphs=False, split_keys=False)
    decoder = Decoder(model, len(PROMPTS), 500)
    assert decoder._step != decoder._pass
    assert decoder._cache.split_keys
    torch.testing.assert_close(texts_of(decoder, 100), texts_of(plain, 100), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_cuda_graph_computes_the_plain_step(fields):
    model = unaligned_model(**fields).cuda()
    expected = texts_of(Decoder(model, len(PROMPTS), 500, graphs=False, split_keys=False), 320)
    actual = texts_of(Decoder(model, len(PROMPTS), 500, graphs=True), 320)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_split_keys_replay_as_a_graph_too():
    model = unaligned_model(kv_heads=2).float().cuda()
    expected = texts_of(Decoder(model, len(PROMPTS), 500, split_keys=True, graphs=False), 100)
    actual = texts_of(Decoder(model, len(PROMPTS), 500, split_keys=True, graphs=True), 100)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
