"""Writes a C program of some 12,000 lines into the folder `build`, always the
same: many small functions that call each other, and a Makefile."""

import pathlib

FILES = 28
FUNCTIONS = 16

state = 1


def draw(limit):
    """A number below `limit`."""
    global state
    state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
    return (state >> 33) % limit


def name(file, number):
    return f"f{file}_{number}"


def body(file, number):
    """A function; it calls only such as come before it."""
    yield f"uint64_t {name(file, number)}(uint64_t a, uint64_t b)"
    yield "{"
    yield f"    uint64_t words[{4 + draw(8)}] = {{ a, b }};"
    yield "    const size_t count = sizeof words / sizeof *words;"
    yield "    for (size_t i = 2; i < count; i++) {"
    yield f"        words[i] = words[i - 1] * {draw(1 << 30) | 1}u + words[i - 2];"
    yield f"        words[i] ^= words[i] >> {1 + draw(31)};"
    yield "    }"
    yield f"    switch (words[count - 1] % {5}) {{"
    for case in range(4):
        yield f"    case {case}:"
        if number > 0 and draw(2) == 0:
            callee = name(file, draw(number))
        elif file > 0:
            callee = name(draw(file), draw(FUNCTIONS))
        else:
            callee = None
        if callee and draw(3) == 0:
            yield f"        return {callee}(words[0] >> {draw(16)}, b) + {draw(1000)};"
        else:
            yield f"        words[1] += words[{draw(4)}] * {draw(1 << 20)};"
            yield "        break;"
    yield "    default:"
    yield f"        words[0] -= {draw(1 << 20)};"
    yield "    }"
    yield "    return words[0] ^ words[1];"
    yield "}"
    yield ""


def main():
    folder = pathlib.Path("build")
    folder.mkdir()
    declarations = ["#include <stddef.h>", "#include <stdint.h>", "#include <stdio.h>"]
    for file in range(FILES):
        for number in range(FUNCTIONS):
            declarations.append(f"uint64_t {name(file, number)}(uint64_t, uint64_t);")
    (folder / "all.h").write_text("\n".join(declarations) + "\n")
    for file in range(FILES):
        lines = ['#include "all.h"', ""]
        for number in range(FUNCTIONS):
            lines += body(file, number)
        (folder / f"part{file}.c").write_text("\n".join(lines))
    lines = ['#include "all.h"', "", "int main(void)", "{", "    uint64_t sum = 1;"]
    for file in range(FILES):
        for number in range(FUNCTIONS):
            lines.append(f"    sum = {name(file, number)}(sum, {draw(1 << 30)}u);")
    lines += ['    printf("%016llx\\n", (unsigned long long)sum);', "    return 0;", "}", ""]
    (folder / "main.c").write_text("\n".join(lines))
    objects = " ".join(["main.o"] + [f"part{file}.o" for file in range(FILES)])
    (folder / "Makefile").write_text(
        f"CFLAGS = -O2 -g -Wall\nprogram: {objects}\n\tgcc -o $@ $^\n{objects}: all.h\n"
    )


main()
