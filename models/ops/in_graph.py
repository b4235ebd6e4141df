"""A function that reads tensors on the host, as one operation that a graph can hold."""

from collections.abc import Callable
from typing import Any

import torch


def in_graph(
    function: Callable[..., torch.Tensor],
    name: str,
    parameters: str,
    num_inputs: int,
    shape: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """`function` where it is called as always; where its caller is compiled the operation `qwen35_moe::NAME`.

    A graph would break at a loop over documents or experts, whose lengths only the host knows, and one break leaves all
    of a checkpointed block uncompiled. parameters: the function's, as torch.library writes them, all without defaults;
    the first `num_inputs` are those that gradients are for. shape: of the same arguments, an empty tensor like the
    result. The operation's backward pass makes the forward pass again.
    """
    forward = torch.library.custom_op(
        f"qwen35_moe::{name}",
        lambda *arguments: function(*arguments),
        mutates_args=(),
        schema=f"({parameters}) -> Tensor",
    )
    forward.register_fake(shape)

    def gradients(gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Of the inputs that want one, which the last argument tells; of others something empty."""
        *arguments_of_function, wants = arguments
        wanted = [index for index, wants_one in enumerate(wants) if wants_one]

        def of_wanted(*inputs: torch.Tensor) -> torch.Tensor:
            replaced = dict(zip(wanted, inputs))
            return function(*(replaced.get(index, each) for index, each in enumerate(arguments_of_function)))

        # An operation runs where autograd is off, and torch.enable_grad alone does not bring it back.
        vjp: Any = torch.func.vjp(of_wanted, *(arguments[index] for index in wanted))
        found = dict(zip(wanted, vjp[1](gradient)))
        return tuple(found[i].contiguous() if i in found else gradient.new_empty(0) for i in range(num_inputs))

    backward = torch.library.custom_op(
        f"qwen35_moe::{name}_backward",
        gradients,
        mutates_args=(),
        schema=f"(Tensor gradient, {parameters}, bool[] wants) -> ({', '.join(['Tensor'] * num_inputs)})",
    )

    @backward.register_fake
    def _(gradient: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) if wants_one else gradient.new_empty(0)
            for x, wants_one in zip(arguments, arguments[-1])
        )

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.is_tensor = [isinstance(each, torch.Tensor) for each in inputs]
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, torch.Tensor)))
        ctx.others = [each for each in inputs if not isinstance(each, torch.Tensor)]

    def autograd(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        arguments = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        wants = list(ctx.needs_input_grad[:num_inputs])
        found = [each if wanted else None for each, wanted in zip(backward(gradient, *arguments, wants), wants)]
        return *found, *[None] * (len(arguments) - num_inputs)

    forward.register_autograd(autograd, setup_context=save)

    def call(*arguments: Any) -> torch.Tensor:
        return forward(*arguments) if torch.compiler.is_compiling() else function(*arguments)

    return call
