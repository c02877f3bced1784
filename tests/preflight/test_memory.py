"""The memory estimate against what really is held: parameters, moments, the tensors that autograd saves, the cache."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hiexp.preflight.memory import activation_bytes, adapter_parameters, estimate, model_shape  # noqa: E402
from hiexp.rl.config import TrainConfig  # noqa: E402
from hiexp.rl.staleness import RolloutsAhead  # noqa: E402

SIZES = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 24}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
}
FACTOR = 1.3  # stated in memory.py


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    config, kind, more = FAMILIES[request.param]
    model = kind(config(**SIZES, **more))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def saved_bytes(model, tokens):
    """Bytes of distinct storages, besides the weights, that the backward pass of ``tokens`` tokens would read."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    ids = torch.arange(tokens).remainder(SIZES["vocab_size"])[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_within_the_stated_factor(model, dtype):
    policy, path = model
    shape = model_shape(str(path))
    for tokens in (64, 200):
        guess = activation_bytes(shape, tokens, dtype.itemsize, checkpointing=False)
        real = saved_bytes(policy.to(dtype), tokens)
        assert guess / FACTOR <= real <= guess * FACTOR


def test_checkpointing_keeps_a_fraction(model):
    policy, path = model
    shape = model_shape(str(path))
    policy.train()
    policy.gradient_checkpointing_enable()
    guess = activation_bytes(shape, 200, 4, checkpointing=True)
    kept = saved_bytes(policy, 200)
    # The estimate adds one layer that is recomputed in the backward pass, which the forward pass does not keep.
    one_layer = activation_bytes(shape, 200, 4, checkpointing=False) / shape.layers
    assert (guess - one_layer) / FACTOR <= kept <= guess
    assert guess < activation_bytes(shape, 200, 4, checkpointing=False)


def config(**stages):
    base = {
        "task": {"train": "q.jsonl"}, "rollout": {"batch_rows": 5, "max_total_tokens": 40},
        "run": {"questions_per_step": 1 << 20},
    }  # fmt: skip
    for stage, values in stages.items():
        base.setdefault(stage, {}).update(values)
    return TrainConfig.from_dict(base)


def test_static_parts_equal_the_real_tensors(model):
    policy, path = model
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(input_ids=torch.arange(7)[None], labels=torch.arange(7)[None]).loss.backward()
    optimizer.step()
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # noqa: E731
    told = estimate(model_shape(str(path)), config(), device="cpu")
    assert told.weights == told.reference == size(policy.parameters())
    assert told.gradients == size(weight.grad for weight in policy.parameters() if weight.grad is not None)
    moments = size(value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    assert told.moments == moments
    assert told.static == 5 * told.weights
    assert estimate(model_shape(str(path)), config(algorithm={"kl_coef": 0}), device="cpu").reference == 0


def test_the_cache_equals_the_real_one(model):
    policy, path = model
    with torch.no_grad():
        cache = policy(input_ids=torch.zeros(5, 40, dtype=torch.long), use_cache=True).past_key_values
    real = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
    told = estimate(model_shape(str(path)), config(), device="cpu")
    assert told.kv_cache == real
    few = {"run": {"questions_per_step": 1}, "rollout": {"group_size": 3}, "evaluation": {"questions": 2}}
    assert estimate(model_shape(str(path)), config(**few), device="cpu").kv_cache * 5 == real * 3
    assert estimate(model_shape(str(path)), config(rollout={"server": "http://h/v1"}), device="cpu").kv_cache == 0


def test_bfloat16_halves_and_the_peak_is_the_larger_phase(model):
    shape = model_shape(str(model[1]))
    wide = estimate(shape, config(), device="cpu")
    half = estimate(shape, config(model={"dtype": "bfloat16"}), device="cpu")
    assert half.static * 2 == wide.static
    assert wide.peak == wide.static + max(wide.rollouts, wide.update)
    many = estimate(shape, config(rollout={"batch_rows": 100_000}), device="cpu")
    assert many.peak == many.static + many.rollouts


def test_vllm_holds_weights_and_its_cache_instead_of_ours(model):
    """On a GPU it sleeps while the policy learns; on a CPU, or when rollouts are made ahead, it does not."""
    shape = model_shape(str(model[1]))
    vllm = {"engine": "vllm", "vllm_cache_gib": 0.5}
    gpu, cpu = (estimate(shape, config(rollout=vllm), device=device) for device in ("cuda", "cpu"))
    ahead = estimate(shape, config(rollout={**vllm, "staleness": 1}), device="cuda")
    for told in (gpu, cpu, ahead):
        assert told.kv_cache == told.sampling == 0
        assert told.engine == told.weights + 2**29
    assert gpu.peak == gpu.static + max(gpu.engine, gpu.update)
    assert cpu.peak == cpu.static + cpu.engine + cpu.update
    assert ahead.peak == ahead.static + ahead.engine + ahead.update
    assert ahead.static == gpu.static + 2 * gpu.weights


@pytest.mark.parametrize("lag", [1, 3])
def test_weights_on_their_way_are_as_many_as_can_wait(model, lag):
    """The trainer is as far ahead as it can get while the worker loads the weights of update 1."""

    class Weights(dict):
        pass

    def load(weights):
        if weights["update"] == 1:
            loading.set()
            assert gate.wait(60)
        return {}

    def weights(update):
        made = Weights(update=update)
        alive.append(weakref.ref(made))
        return made

    alive, gate, loading = [], threading.Event(), threading.Event()
    source = RolloutsAhead(lambda step, policy: [], load, lag, 100)
    source.begin(0, weights(0), {})
    for step in range(1, lag + 2):  # rollouts of the next step need the weights of update 1
        source.take(step)
        source.updated(step, weights(step))
    assert loading.wait(60)
    gc.collect()
    held = sum(one() is not None for one in alive)
    gate.set()
    source.close()
    shape = model_shape(str(model[1]))
    told, none = (estimate(shape, config(rollout={"staleness": n}), device="cuda") for n in (lag, 0))
    assert told.copies == held * told.weights == (lag + 1) * told.weights
    assert told.engine == told.weights
    assert told.peak == none.static + told.copies + told.engine + none.rollouts + none.update
    away = estimate(shape, config(rollout={"staleness": lag, "server": "http://h/v1"}), device="cuda")
    assert (away.engine, away.copies) == (0, told.copies)
    assert none.engine == none.copies == 0


def test_a_model_without_the_usual_sizes_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_layer": 2, "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"has no .*intermediate_size"):
        model_shape(str(tmp_path))


def test_adapters_have_as_many_numbers_as_their_layers_ask_for(model):
    policy, path = model
    shape = model_shape(str(path))
    linear = [each for name, each in policy.named_modules() if isinstance(each, torch.nn.Linear) and name != "lm_head"]
    assert adapter_parameters(shape, 4) == sum(4 * (each.in_features + each.out_features) for each in linear)


def test_shards_divide_what_is_trained_and_nothing_else(model):
    shape = model_shape(str(model[1]))
    one, four = (estimate(shape, config(), device="cpu", shards=n) for n in (1, 4))
    trained = one.weights + one.gradients + one.moments
    # A whole copy acts on every process, and the reference is whole as well.
    assert four.static == pytest.approx(trained / 4 + one.weights + one.reference, rel=1e-4)
    assert (four.rollouts, four.update) == (one.rollouts, one.update)
