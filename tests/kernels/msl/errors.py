"""What can go wrong: in a kernel, or in the tools that run it."""


class KernelError(AssertionError):
    """The kernel has a bug. The message has one line for each finding."""


class CompileError(KernelError):
    """The kernel does not compile."""


class ToolError(RuntimeError):
    """The harness itself cannot work, such as without a C++ compiler. Not a kernel's fault, and
    not a `KernelError`, so that no test takes it for a bug found."""
