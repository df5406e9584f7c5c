"""Triton's interpreter, made faster: it patches its language anew wherever one function calls another.

Half of the time of a kernel of many small functions went there. What is patched already is left as it is. So is
the table of NumPy's dtypes, made anew for each value.
"""

import functools
import inspect


def patch_once():
    """Let each module of the language be patched once until what patched it restores it."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    plain = getattr(interpreter, "_patch_lang", None)
    if plain is None:  # another version, another way
        return
    patched = set()

    @functools.cache
    def languages(fn):
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    class Nothing:
        def restore(self):
            pass

    def patch(fn):
        names = languages(fn) - patched
        if not names:
            return Nothing()
        scope = plain(fn)
        patched.update(names)
        restore = scope.restore

        def restore_all():
            restore()
            patched.difference_update(names)

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch
    every = interpreter._get_np_dtype
    scalar = functools.cache(every)
    interpreter._get_np_dtype = lambda dtype: (scalar if type(dtype) is tl.dtype else every)(dtype)
