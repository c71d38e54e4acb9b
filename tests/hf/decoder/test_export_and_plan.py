"""A trained decoder goes back to transformers with equal weights; plans, weights that are refused, and commands."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.checkpoint.initial_weights import InitialWeights
from longnet_dist.checkpoint.run_model import new_model
from longnet_dist.cli import evaluate, export, generate, plan, prepare
from longnet_dist.engine.execution import Execution
from longnet_dist.errors import CheckpointError, LongNetError
from longnet_dist.estimate.activations import saved_by_block
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import num_parameters
from longnet_dist.hf import CompactCache
from tests.hf.decoder.decoders import decoder_config, write_decoder
from tests.train.runs import import_deepspeed, run


def write_tokenizer(folder):
    """A tokenizer of bytes, as a model brings one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 999}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a bf16 model, its data, and a run that trained it for a step."""
    import_deepspeed()
    folder = tmp_path_factory.mktemp("trained")
    source = write_decoder(folder / "source", "llama", torch.bfloat16)
    write_tokenizer(source)
    (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(300)))
    words = [str(folder / "text.txt"), "--output", str(folder / "data"), "--tokenizer", str(source / "tokenizer.json")]
    prepare.main([*words, "--workers", "1", "--validation", "0.2"])
    run(2, decoder_config(source, folder / "run", folder / "data", "train.steps=2"))
    return folder


def test_what_is_exported_is_the_trained_model_in_the_dtype_of_its_source(trained, tmp_path):
    export.main([str(trained / "run"), "--to", "hf", "--output", str(tmp_path / "out")])
    weights = load_file(newest_checkpoint(trained / "run") / "model.safetensors")
    found, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(trained / "source/model.safetensors")
    assert found.keys() == weights.keys() == source.keys()
    assert all(torch.equal(found[name], weights[name].to(torch.bfloat16)) for name in weights)
    assert any(not torch.equal(found[name], source[name]) for name in source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dilated_pattern"]["segment_lengths"] == [16, 32, 64]
    assert config["attn_implementation"] == "dilated"
    assert "sequences of 64 tokens" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    before = json.loads((trained / "source" / "config.json").read_text())
    assert {name: config[name] for name in before if name != "transformers_version"} == {
        name: value for name, value in before.items() if name != "transformers_version"
    }
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("line").input_ids
        == AutoTokenizer.from_pretrained(trained / "source")("line").input_ids
    )


def test_the_exported_model_writes_what_the_run_writes(trained, tmp_path, capsys):
    export.main([str(trained / "run"), str(tmp_path / "out"), "--to", "hf", "--precision", "fp32"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("line 12 of", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = tokenizer.decode(model.generate(prompt, cache=CompactCache(model.config), **settings)[0])
    capsys.readouterr()
    generate.main([str(trained / "run"), "--prompt", "line 12 of", "--tokens", "20", "--temperature", "0"])
    assert capsys.readouterr().out.rstrip("\n") == expected
    generate.main([str(tmp_path / "out"), "--prompt", "line 12 of", "--tokens", "20", "--temperature", "0"])
    assert capsys.readouterr().out.rstrip("\n") == expected


def test_a_run_is_evaluated_whole_and_as_a_stream(trained, capsys):
    words = [str(trained / "run"), "--data", str(trained / "data"), "--tokens", "256", "--json"]
    evaluate.main([*words, "--context", "256"])
    evaluate.main([*words, "--split", "validation", "--stream", "--chunk", "64"])
    whole, streamed = (json.loads(line)["256"] for line in capsys.readouterr().out.splitlines())
    assert streamed["tokens"] == whole["tokens"] == 256
    assert streamed["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_run_goes_back_only_to_where_it_came_from(trained, tmp_path):
    with pytest.raises(LongNetError, match=r"trained a model of transformers, which .*; use --to hf"):
        export.main([str(trained / "run"), str(tmp_path / "out")])
    with pytest.raises(LongNetError, match="give one output folder"):
        export.main([str(trained / "run"), "--to", "hf"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LongNetError, match="is not empty"):
        export.main([str(trained / "run"), str(tmp_path), "--to", "hf"])


def model_of(source):
    return decoder_config(source, "run", "data").model


def test_weights_that_are_pickled_or_do_not_fit_are_refused(tmp_path):
    source = write_decoder(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: torch.zeros(3, 3)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"does not fit the model: the shape of {name} is \[3, 3\] there and"):
        InitialWeights.of_model(model_of(source), begins=True)
    (source / "model.safetensors").write_text("torn")
    with pytest.raises(CheckpointError, match="cannot read the weights in"):
        InitialWeights.of_model(model_of(source), begins=True)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which is not read, since a pickle may run code"):
        InitialWeights.of_model(model_of(source), begins=True)
    assert InitialWeights.of_model(model_of(source / "config.json"), begins=True) is None


def test_a_folder_without_weights_writes_no_text(tmp_path):
    source = write_decoder(tmp_path / "source")
    (source / "model.safetensors").unlink()
    config = json.loads((source / "config.json").read_text())
    fields = {"segment_lengths": [16], "dilation_rates": [1], "head_offsets": "modulo"}
    (source / "config.json").write_text(json.dumps(config | {"dilated_pattern": fields}))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors with weights; give a trained model"):
        generate.main([str(source), "--prompt", "line"])


def test_weights_in_several_files_are_one_model(tmp_path):
    one = write_decoder(tmp_path / "one", "mistral")
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    found = InitialWeights.of_model(model_of(tmp_path / "many"), begins=True)
    model = torch.nn.Module()
    expected = load_file(one / "model.safetensors")
    model.named_parameters = lambda: [(name, torch.nn.Parameter(torch.zeros_like(x))) for name, x in expected.items()]
    parameters = model.named_parameters()
    model.named_parameters = lambda: parameters
    found.load(model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters)


@pytest.mark.parametrize(
    ("precision", "mode", "tile"), [("fp32", "full", 128), ("fp32", "none", 128), ("bf16", "none", None)]
)
def test_the_saved_bytes_of_a_block_are_counted(tmp_path, precision, mode, tile):
    """What all of autograd saves, for a second block more, without parameters."""
    source = write_decoder(tmp_path / "source", "qwen3")
    settings = ["data.sequence_length=512", "train.batch_size=1", f"train.activation_checkpointing={mode}"]
    settings += [f"train.precision={precision}", f"train.feed_forward_tile={tile or 'null'}"]
    config = decoder_config(source, tmp_path / "run", tmp_path / "data", *settings)
    sizes = []
    for layers in (2, 3):
        model = config.model
        fields = model.config | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
        changed = type(model)(config=fields, segment_lengths=(16, 32, 64), dilation_rates=(1, 2, 4))
        net, saved = new_model(changed, execution=Execution(mode, tile=tile)), {}
        net.to(torch.bfloat16 if precision == "bf16" else torch.float32)

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.zeros(1, 512, dtype=torch.int64)).logits.sum()
        known = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        sizes.append(sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in known))
    layout = RunLayout.of(config, 1, "cpu")
    assert saved_by_block(layout) == pytest.approx(sizes[1] - sizes[0], rel=0.02)


def test_a_run_is_planned_from_config_json(tmp_path, capsys):
    source = write_decoder(tmp_path / "source")
    words = [f"model.path={source}", "model.segment_lengths=[16,64]", "model.dilation_rates=[1,4]"]
    plan.main([*words, "train.output_dir=x", "train.steps=1", "--device", "h200", "--json", "--optimize"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == num_parameters(model_of(source))
    assert found["fits"]
    assert found["step_seconds"] > 0
    assert found["flops_per_token"] > 6 * 4 * 32 * 48
    modes = {word for one in found["optimized"] for word in one["settings"].split() if "activation" in word}
    assert modes <= {"train.activation_checkpointing=full", "train.activation_checkpointing=none"}
