"""Generation: greedy as the reference, stop tokens, blocks of prefill, sampling, and logits_of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_configs import CASES, build, hf_model, make_tokens, packed

from llama4_triton.model.generate import Sampling, generate, logits_of, prefill_tokens, sample
from llama4_triton.model.llama4 import Llama4
from llama4_triton.model.reference import Llama4 as Reference

CONFIG = CASES["scout"]  # chunk 8


def _greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(packed(model, [tokens])[0][-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.unsanitized
def test_kernels_generate_what_the_reference_generates(device):
    config = replace(CONFIG, num_hidden_layers=2, no_rope_layers=(1, 0))  # one of each kind
    prompts = make_tokens(config, [6, 13])
    got = generate(build(Llama4, config).to(device), prompts, max_new_tokens=4, stop_ids=())
    reference = build(Reference, config)
    assert got.tokens == [_greedy(reference, prompt, 4) for prompt in prompts]


@pytest.mark.no_kernels
class TestWithReference:
    """What generation does with the tokens does not depend on who computes the logits."""

    def test_greedy_equals_full_recompute_and_transformers(self):
        (prompt,) = make_tokens(CONFIG, [13])
        reference = build(Reference, CONFIG)
        got = generate(reference, [prompt], max_new_tokens=9, stop_ids=()).tokens[0]
        assert got == _greedy(reference, prompt, 9)
        hf = hf_model(CONFIG)
        tokens = hf.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert got == tokens[0, len(prompt) :].tolist()

    def test_long_prompts_are_prefilled_chunk_by_chunk(self):
        prompts = make_tokens(CONFIG, [27, 3, 16])
        assert prefill_tokens(CONFIG) == 8
        reference = build(Reference, CONFIG)
        got = generate(reference, prompts, max_new_tokens=3, stop_ids=())
        assert (got.prefill_steps, got.decode_steps) == (4, 2)
        assert got.tokens == [_greedy(reference, prompt, 3) for prompt in prompts]

    def test_a_stop_token_ends_its_own_sequence_only(self):
        prompts = make_tokens(CONFIG, [5, 9])
        reference = build(Reference, CONFIG)
        free = generate(reference, prompts, max_new_tokens=6, stop_ids=()).tokens
        stop = free[0][2]
        got = generate(reference, prompts, max_new_tokens=6, stop_ids=[stop]).tokens
        for row in range(2):
            full = free[row]
            assert got[row] == (full[: full.index(stop)] if stop in full else full)
        assert len(got[0]) <= 2

    def test_tokens_are_reported_as_they_come(self):
        prompts = make_tokens(CONFIG, [4, 2])
        seen = []
        got = generate(
            build(Reference, CONFIG),
            prompts,
            max_new_tokens=2,
            stop_ids=(),
            on_token=lambda row, token: seen.append((row, token)),
        )
        assert sorted(seen) == sorted((r, t) for r in range(2) for t in got.tokens[r])

    @pytest.mark.parametrize(
        "arguments, match",
        [
            (dict(prompts=[[]], max_new_tokens=1), "prompts must have at least one token"),
            (dict(prompts=[[1]], max_new_tokens=-1), "max_new_tokens must be >= 0, got -1"),
        ],
        ids=["empty-prompt", "negative-length"],
    )
    def test_bad_arguments(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            generate(build(Reference, CONFIG), **arguments)

    def test_nothing_to_do(self):
        model = build(Reference, CONFIG)
        assert generate(model, [], max_new_tokens=3).tokens == []
        assert generate(model, [[1]], max_new_tokens=0).tokens == [[]]

    def test_sampling_is_reproducible_and_follows_the_distribution(self):
        logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
        sampling = Sampling(temperature=2.0, top_p=1.0, seed=1)
        generator = torch.Generator().manual_seed(1)
        counts = sample(logits, sampling, generator).bincount(minlength=4) / 20_000
        want = (logits[0] / 2.0).softmax(-1)
        assert torch.allclose(counts, want, atol=0.015)  # 4 standard deviations
        again = sample(logits, sampling, torch.Generator().manual_seed(1))
        assert torch.equal(again.bincount(minlength=4) / 20_000, counts)

    def test_top_p_keeps_the_token_that_crosses_it(self):
        logits = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]])).expand(2_000, 4)
        sampling = Sampling(temperature=1.0, top_p=0.6)
        got = sample(logits, sampling, torch.Generator().manual_seed(0))
        assert set(got.tolist()) == {1, 2}
        only = sample(logits, Sampling(temperature=1.0, top_p=0.01), torch.Generator())
        assert set(only.tolist()) == {1}

    def test_greedy_ties_go_to_the_lowest_id(self):
        logits = torch.tensor([[1.0, 3.0, 3.0]])
        assert sample(logits, Sampling(), torch.Generator()).tolist() == [1]

    @pytest.mark.parametrize(
        "arguments, match",
        [
            (dict(temperature=-0.1), "temperature must be finite and >= 0"),
            (dict(temperature=float("nan")), "temperature must be finite and >= 0"),
            (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
            (dict(top_p=1.5), r"top_p must be in \(0, 1\]"),
        ],
        ids=str,
    )
    def test_bad_sampling(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            Sampling(**arguments)

    def test_logits_of_a_padded_batch(self):
        tokens = make_tokens(CONFIG, [11, 7, 4])
        ids = torch.zeros(3, 11, dtype=torch.int64)
        mask = torch.zeros(3, 11, dtype=torch.int64)
        for row, (sequence, left) in enumerate(zip(tokens, (0, 4, 2), strict=True)):
            ids[row, left : left + len(sequence)] = torch.tensor(sequence)
            mask[row, left : left + len(sequence)] = 1
        model = build(Reference, CONFIG)
        for blocks in (None, [5, 0, 6]):
            got = logits_of(model, ids, mask, blocks=blocks)
            assert got.shape == (3, 11, CONFIG.vocab_size)
            assert float(got[mask == 0].abs().max()) == 0.0
            for row, sequence in enumerate(tokens):
                alone = packed(model, [sequence])[0]
                assert float((got[row][mask[row] == 1] - alone).abs().max()) <= 1e-5

    def test_parity_with_transformers_reproduces_left_padding(self):
        (tokens,) = make_tokens(CONFIG, [9])
        ids = torch.tensor([[0] * 5 + tokens])
        mask = torch.tensor([[0] * 5 + [1] * 9])
        with torch.no_grad():
            want = hf_model(CONFIG)(input_ids=ids, attention_mask=mask, use_cache=False).logits
        got = logits_of(build(Reference, CONFIG, parity="hf"), ids, mask)
        assert float((got[:, 5:] - want[:, 5:]).abs().max()) <= 2e-4
        default = logits_of(build(Reference, CONFIG), ids, mask)
        assert float((default[:, 5:] - want[:, 5:]).abs().max()) > 1e-3

    @pytest.mark.parametrize(
        "ids, mask, blocks, match",
        [
            ([1, 2], None, None, r"input_ids must have shape \(B, S\)"),
            ([[1, 2]], [[1, 1, 1]], None, "attention_mask must have shape"),
            ([[1, 2, 3]], [[1, 0, 1]], None, "attention_mask must have no hole"),
            ([[1, 2, 3]], None, [1, 1], "blocks must be >= 0 and sum to S = 3"),
        ],
        ids=["rank", "mask-shape", "hole", "blocks"],
    )
    def test_bad_logits_input(self, ids, mask, blocks, match):
        mask = None if mask is None else torch.tensor(mask)
        with pytest.raises(ValueError, match=match):
            logits_of(build(Reference, CONFIG), torch.tensor(ids), mask, blocks=blocks)
