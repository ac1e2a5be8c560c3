"""Where gradients lie and become one: from a backward pass to the combined gradient that an optimizer finds."""
