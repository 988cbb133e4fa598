"""A library with the functions of NVRTC, which needs no GPU and compiles nothing.

Its cubin is "ELF", the options and the source. Variables of the environment control it:

    FAKE_NVRTC_WAIT     it compiles only once this file exists
    FAKE_NVRTC_COUNT    it appends one byte to this file for each compilation
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ARCHITECTURES = (75, 80, 87, 90, 100, 103, 120)
SOURCE = """
#include <string.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
struct Program { char* source; char* cubin; const char* log; };
typedef struct Program* P;
static const int kArchitectures[] = {ARCHITECTURES};
const char* nvrtcGetErrorString(int e) { return e == 6 ? "NVRTC_ERROR_COMPILATION" : "OTHER"; }
int nvrtcVersion(int* major, int* minor) { *major = 12; *minor = MINOR; return 0; }
int nvrtcGetNumSupportedArchs(int* n) {
  *n = sizeof kArchitectures / sizeof *kArchitectures;
  return 0;
}
int nvrtcGetSupportedArchs(int* list) {
  memcpy(list, kArchitectures, sizeof kArchitectures);
  return 0;
}
int nvrtcCreateProgram(P* p, const char* source, const char* name, int n, char** a, char** b) {
  *p = calloc(1, sizeof **p);
  (*p)->source = strdup(source);
  return 0;
}
int nvrtcCompileProgram(P p, int n, const char** options) {
  volatile char stack[1 << 20];  // the real one needs about as much
  const char* file = getenv("FAKE_NVRTC_COUNT");
  for (size_t i = 0; i < sizeof stack; i += 1024) stack[i] = 1;
  if (file) { FILE* f = fopen(file, "a"); fputc('x', f); fclose(f); }
  while ((file = getenv("FAKE_NVRTC_WAIT")) && access(file, F_OK)) usleep(1000);
  p->log = "kernels.cu(3): warning: unused\\nkernels.cu(7): error: expected a ';'\\n1 error\\n";
  if (strstr(p->source, "FAIL")) return 6;
  p->cubin = malloc(strlen(p->source) + 1000);
  strcpy(p->cubin, "ELF");
  for (int i = 0; i < n; ++i) { strcat(p->cubin, " "); strcat(p->cubin, options[i]); }
  strcat(strcat(p->cubin, " "), p->source);
  return 0;
}
int nvrtcGetProgramLogSize(P p, size_t* n) { *n = strlen(p->log) + 1; return 0; }
int nvrtcGetProgramLog(P p, char* out) { strcpy(out, p->log); return 0; }
int nvrtcGetCUBINSize(P p, size_t* n) { *n = strlen(p->cubin); return 0; }
int nvrtcGetCUBIN(P p, char* out) { memcpy(out, p->cubin, strlen(p->cubin)); return 0; }
int nvrtcDestroyProgram(P* p) { *p = 0; return 0; }
"""


@functools.cache
def library(minor: int = 9, name: str = "libfake_nvrtc.so") -> str:
    """Return the path of the library, which says that it is version 12.`minor`.

    `nvrtc.find` returns one with the name of a real one in each process that has loaded it. Skips
    the test if there is no C compiler.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        pytest.skip("there is no C compiler, which the fake NVRTC needs")
    path = Path(tempfile.mkdtemp(), name)
    numbers = ",".join(map(str, ARCHITECTURES))
    defines = (f"-DMINOR={minor}", f"-DARCHITECTURES={numbers}", f"-Wl,-soname,{name}")
    command = [compiler, "-x", "c", "-", "-shared", "-fPIC", *defines, "-o", str(path)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return str(path)


def cubin(architecture: int, source: str) -> bytes:
    """Return what the library makes."""
    return f"ELF --gpu-architecture=sm_{architecture} --std=c++17 {source}".encode()


def wait_until_compiling(count: Path) -> None:
    """Wait until a compilation has started. `count` is the file of FAKE_NVRTC_COUNT."""
    while not count.exists():
        time.sleep(0.001)
