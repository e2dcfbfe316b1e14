"""Files of every kind damaged entry by entry and byte by byte: refused by name, or read to the same values."""

import json

import jax
import jax.numpy as jnp
import llava_folders
import numpy as np
import pytest
import test_vision as vision
from decoders import tiny, weights
from hostile import check, cut, damaged_json, damaged_safetensors, flipped, odd_number
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_huggingface import tensors, write

import jprune
from jprune.budget.latency import LatencyTable, measure_latency
from jprune.checkpoint import load, load_hf, load_safetensors, load_tokenizer, save, save_hf
from jprune.checkpoint.huggingface import read_config
from jprune.checkpoint.llava import load_llava
from jprune.checkpoint.vision import load_vision
from jprune.data.cifar import read_records
from jprune.data.images import read_image
from jprune.data.text import read_text
from jprune.files.json_files import parse_json
from jprune.files.npz import read_npz
from jprune.language.lora import LoraConfig, init
from jprune.language.peft import load_peft, save_peft
from jprune.models.llama import Llama
from jprune.surgery.plan import Plan

# Reading a damaged orbax folder leaves threads behind, which complain later that orbax has closed its event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
EVERY = [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def differs(tree, whole):
    """Why two trees are not the same bits, in heads of any number; None if they are."""
    if jax.tree.structure(tree) != jax.tree.structure(whole):
        return "another tree"
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(whole), strict=True):
        if a.size != b.size or a.dtype != b.dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes():
            return "other weights"
    return None


def same_weights(whole, config_of=lambda found: found[0], tree_of=lambda found: found[1]):
    """The same weights, and in the config no number that is negative, infinite or none."""

    def sound(found):
        odd = odd_number(config_of(found))
        return differs(tree_of(found), whole) or (None if odd is None else f"its config has {odd}")

    return sound


@pytest.mark.parametrize("every", EVERY)
def test_folders_of_decoders(tmp_path, every):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    folder = write(tmp_path / "m", shards=2)
    said = json.loads((folder / "config.json").read_text()) | {"rope_scaling": scaling, "sliding_window": 3}
    (folder / "config.json").write_text(json.dumps({**said, "per_layer_config": {"1": {"intermediate_size": 48}}}))
    whole = load_hf(folder)[1]
    for name in ("config.json", "model.safetensors.index.json"):
        file = folder / name
        assert check(file, damaged_json(file.read_text(), every), lambda: load_hf(folder), same_weights(whole)) > 10
    file = sorted(folder.glob("*.safetensors"))[0]
    assert (
        check(file, damaged_safetensors(file.read_bytes(), 7 * every), lambda: load_hf(folder), same_weights(whole))
        > 10
    )


@pytest.mark.parametrize("every", EVERY)
def test_records_of_pruned_decoders(tmp_path, every):
    config = tiny(depth=2, ffn=(3, 5), q_heads=(4, 4), kv_heads=(2, 2))
    save_hf(weights(config), config, tmp_path / "m", mode="padded", multiple_of=8)
    whole = load_hf(tmp_path / "m")[1]
    file = tmp_path / "m" / "jprune.json"
    kept = ("format", "mode", "family", "widths")  # what is read of it
    text = json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k in kept})
    assert check(file, damaged_json(text, 2 * every), lambda: load_hf(tmp_path / "m"), same_weights(whole)) > 5


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize(("make", "said"), [(vision.timm, vision.TIMM), (vision.transformers, vision.HF)])
def test_folders_of_vision_transformers(tmp_path, make, said, every):
    vision.write(tmp_path / "v", make(), {**said, "id2label": {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}})
    whole = load_vision(tmp_path / "v").variables
    sound = same_weights(whole, lambda found: (found.module.config, found.preprocess), lambda found: found.variables)
    file = tmp_path / "v" / "config.json"
    assert check(file, damaged_json(file.read_text(), 3 * every), lambda: load_vision(tmp_path / "v"), sound) > 2
    if said is vision.HF:
        file = tmp_path / "v" / "preprocessor_config.json"
        file.write_text(json.dumps({"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                                    "resample": 2, "do_resize": True, "do_center_crop": True, "crop_size": 8}))  # fmt: skip
        assert check(file, damaged_json(file.read_text(), 3 * every), lambda: load_vision(tmp_path / "v"), sound) > 1


@pytest.mark.parametrize("every", EVERY)
def test_folders_of_llavas(tmp_path, every):
    llava_folders.write(tmp_path / "m")
    whole = load_llava(tmp_path / "m").variables
    sound = same_weights(whole, lambda found: found.module.config, lambda found: found.variables)
    file = tmp_path / "m" / "config.json"
    assert check(file, damaged_json(file.read_text(), 16 * every), lambda: load_llava(tmp_path / "m"), sound) > 3


@pytest.mark.parametrize("every", EVERY)
def test_folders_of_adapters(tmp_path, every):
    module = Llama(tiny(vocab=20, stream=16, ffn=12, depth=1))
    v = weights(module.config)
    graph = jprune.trace(module.apply, v, jnp.zeros((2, 3), jnp.int32))
    config = LoraConfig(2, 5.0)
    lora = jax.tree.map(lambda x: x + 1, init(jax.random.key(0), graph, config))
    save_peft(tmp_path / "a", graph, lora, module.config.head_dim)

    def read():
        return load_peft(tmp_path / "a", graph, module.config.head_dim)

    def sound(found):
        a, b = ({t: f["a"] for t, f in x.items()} for x in (found[0], whole))
        finite = all(np.isfinite(x).all() for x in jax.tree.leaves(found[0]))
        return differs(a, b) or (None if finite and odd_number((found[1].rank, found[1].alpha)) is None else "NaN")

    whole = read()[0]
    file = tmp_path / "a" / "adapter_config.json"
    assert check(file, damaged_json(file.read_text(), 3 * every), read, sound) > 5
    file = tmp_path / "a" / "adapter_model.safetensors"
    assert check(file, damaged_safetensors(file.read_bytes(), 20 * every), read, sound) > 10


@pytest.mark.parametrize("every", EVERY)
def test_checkpoints(tmp_path, every):
    save(tmp_path / "c", {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones(2)]}, {"model": "x"})
    whole = load(tmp_path / "c")[0]
    for name, stride in (("metadata.json", 1), ("variables/_METADATA", 9)):
        file = tmp_path / "c" / name
        variants = damaged_json(file.read_text(), stride * every)
        assert (
            check(file, variants, lambda: load(tmp_path / "c"), lambda found: differs(found[0], whole), tmp_path / "c")
            > 3
        )


@pytest.mark.parametrize("every", EVERY)
def test_plans_and_latency_tables(tmp_path, every):
    p = {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}
    graph = jprune.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], p, jnp.ones((2, 3)))
    file, plan = tmp_path / "plan.json", graph.plan({"a:1": np.arange(6) > 1})
    plan.save(file)
    p = {k: np.arange(x.size, dtype=np.float32).reshape(x.shape) for k, x in p.items()}
    whole = plan.apply(p)

    def sound(found):
        try:
            return differs(found.apply(p), whole)
        except jprune.KeepError:  # a plan for other shapes; the leaf is named
            return None

    assert check(file, damaged_json(file.read_text(), every), lambda: Plan.load(file), sound) > 10
    file = tmp_path / "table.json"
    measure_latency(graph, lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], (p, jnp.ones((2, 3))), (0.5, 1.0),
                    timer=lambda *_: 1.0, progress=False).save(file)  # fmt: skip
    assert check(file, damaged_json(file.read_text(), every), lambda: LatencyTable.load(file, graph),
                 lambda found: odd_number((found.whole, found.scale, found.rest, found.grids))) > 10  # fmt: skip


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    whole = {"0": rng.random((4, 5)) < 0.5, "1": rng.normal(size=30).astype(np.float32)}
    np.savez(tmp_path / "k.npz", **whole)
    file = tmp_path / "k.npz"
    data = file.read_bytes()
    check(file, [*cut(data, 40), *flipped(data, 150)], lambda: read_npz(file), lambda found: differs(found, whole))
    np.savez(file, x=np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"k\.npz is damaged"):
        read_npz(file)
    save_file(whole, tmp_path / "k.safetensors")
    file = tmp_path / "k.safetensors"
    check(
        file,
        damaged_safetensors(file.read_bytes(), 3),
        lambda: load_safetensors(file),
        lambda found: differs(found[0], whole),
    )


def test_pictures_and_records(tmp_path):
    rng = np.random.default_rng(0)
    for ending in ("png", "jpg", "bmp", "webp"):
        file = tmp_path / f"p.{ending}"
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(file)
        data = file.read_bytes()
        # a picture has no digest: changed bytes may be other colours, and are a picture all the same
        check(file, [*cut(data), *flipped(data, 40)], lambda file=file: read_image(file), lambda found: None)
    labels, pixels = rng.integers(0, 10, (3, 1), np.uint8), rng.integers(0, 256, (3, 3072), np.uint8)
    file = tmp_path / "data_batch_1.bin"
    file.write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    data = file.read_bytes()
    assert (
        check(file, cut(data), lambda: read_records(file, 10), lambda found: None if len(found[0]) < 3 else "all") > 5
    )
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "a word"}')
    assert check(file, damaged_json(file.read_text()), lambda: read_text(file), lambda text: None) > 10


def test_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    file = tmp_path / "tokenizer.json"
    words.save(str(file))
    sound = lambda found: None if found.encode("a").ids in ([0], [2]) else "another tokenizer"  # noqa: E731
    assert check(file, damaged_json(file.read_text(), 3), lambda: load_tokenizer(tmp_path), sound) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        ("[" * 66 + "]" * 66, "nested more than 64 deep"),
        ("[" * 10**6, "nested more than 64 deep"),
        (b'{"a": "\xff"}', "utf-8"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    assert parse_json("[" * 64 + "1" + "]" * 64) and parse_json('{"a": {"b": 1}, "b": 2}') == {"a": {"b": 1}, "b": 2}


def test_a_tensor_that_a_header_names_twice_is_refused(tmp_path):
    folder = write(tmp_path / "m")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    twice = header.replace(b"layers.0.mlp.up_proj", b"layers.0.mlp.gate_proj")  # two tensors of one shape, one name
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    for read in (lambda: load_hf(folder), lambda: load_safetensors(file)):
        with pytest.raises(
            ValueError, match=r"model\.safetensors .*the key 'model.layers.0.mlp.gate_proj.weight' twice"
        ):
            read()


def test_a_tensor_in_two_shards_and_too_many_layers_are_refused_at_once(tmp_path):
    folder = write(tmp_path / "m", shards=2)
    one, two = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(two), **{k: v for k, v in list(load_file(one).items())[:1]}}, two)
    with pytest.raises(ValueError, match="both have a tensor"):
        load_hf(folder)
    folder = write(tmp_path / "n", tensors())
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 3000}))
    with pytest.raises(ValueError, match=r"n/config.json: num_hidden_layers is 3000, and the files hold 2 layers"):
        load_hf(folder)
    (folder / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 30_000_000}))
    for read in (load_hf, read_config):  # one of them without a look at the files
        with pytest.raises(ValueError, match=r"n/config.json: num_hidden_layers is 30000000: .* from 1 to 100000"):
            read(folder)
