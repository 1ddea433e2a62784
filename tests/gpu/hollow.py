"""A hollow CUDA: libraries that say yes to everything and compute nothing, for machines without a card.

ONNX Runtime's CUDA provider is real, with its kernel registry, graph partitioner, attention dispatch and graph capture;
the driver, the runtime and cuBLAS under it are stubs made here from the list of symbols that it wants. "Device" memory
is the host's, kernels are not launched, so numbers mean nothing, but where each node was placed, which attention kernel
was chosen and what was captured is what a card of compute capability 9.0 would see.
"""

import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort

_LIBRARIES = ("cudart", "cublas", "cublasLt", "curand")
_CAPABILITY = 9

# Functions whose callers read more than the return value. Offsets are those of CUDA 13's structures.
_CUDART = f"""
static char handle[64];
int cudaGetDeviceCount(int *n) {{ *n = 1; return 0; }}
int cudaGetDevice(int *d) {{ *d = 0; return 0; }}
int cudaDeviceGetAttribute(int *v, int what, int d) {{
  *v = what == 75 ? {_CAPABILITY} : what == 16 ? 132 : what == 97 ? 232448 : what == 81 ? 233472 : 0;
  return 0;
}}
int cudaDriverGetVersion(int *v) {{ *v = 13000; return 0; }}
int cudaRuntimeGetVersion(int *v) {{ *v = 13000; return 0; }}
int cudaGetDeviceProperties(char *p, int d) {{
  memset(p, 0, 1008);
  strcpy(p, "hollow");
  *(size_t *)(p + 288) = 8ull << 30;  /* totalGlobalMem */
  *(size_t *)(p + 296) = 49152;       /* sharedMemPerBlock */
  *(int *)(p + 304) = 65536;          /* regsPerBlock */
  *(int *)(p + 308) = 32;             /* warpSize */
  *(int *)(p + 320) = 1024;           /* maxThreadsPerBlock */
  for (int i = 0; i < 3; ++i) *(int *)(p + 324 + 4 * i) = 1024, *(int *)(p + 336 + 4 * i) = 65535;
  *(int *)(p + 360) = {_CAPABILITY};  /* major */
  *(int *)(p + 384) = 132;            /* multiProcessorCount */
  *(int *)(p + 596) = 50 << 20;       /* l2CacheSize */
  *(int *)(p + 604) = 2048;           /* maxThreadsPerMultiProcessor */
  *(size_t *)(p + 624) = 233472;      /* sharedMemPerMultiprocessor */
  *(size_t *)(p + 672) = 232448;      /* sharedMemPerBlockOptin */
  return 0;
}}
int cudaFuncGetAttributes(char *a, const void *f) {{
  memset(a, 0, 144);
  *(int *)(a + 24) = 1024, *(int *)(a + 28) = 32, *(int *)(a + 32) = 90, *(int *)(a + 36) = 90;
  return 0;
}}
int cudaPointerGetAttributes(char *a, const void *p) {{ memset(a, 0, 88); *(int *)a = 2; return 0; }}
static int get(void **p, size_t n) {{ return posix_memalign(p, 256, n ? n : 1) ? 2 : 0; }}
int cudaMalloc(void **p, size_t n) {{ return get(p, n); }}
int cudaMallocHost(void **p, size_t n) {{ return get(p, n); }}
int cudaHostAlloc(void **p, size_t n, unsigned f) {{ return get(p, n); }}
int cudaMallocFromPoolAsync(void **p, size_t n) {{ return get(p, n); }}
int cudaFree(void *p) {{ free(p); return 0; }}
int cudaFreeAsync(void *p) {{ free(p); return 0; }}
int cudaFreeHost(void *p) {{ free(p); return 0; }}
int cudaMemcpy(void *d, const void *s, size_t n) {{ memmove(d, s, n); return 0; }}
int cudaMemcpyAsync(void *d, const void *s, size_t n) {{ memmove(d, s, n); return 0; }}
int cudaMemcpyFromSymbol(void *d, const void *s, size_t n) {{ memset(d, 0, n); return 0; }}
int cudaMemset(void *d, int v, size_t n) {{ memset(d, v, n); return 0; }}
int cudaMemsetAsync(void *d, int v, size_t n) {{ memset(d, v, n); return 0; }}
int cudaMemGetInfo(size_t *f, size_t *t) {{ *f = *t = 8ull << 30; return 0; }}
const char *cudaGetErrorName(int e) {{ return "hollow"; }}
const char *cudaGetErrorString(int e) {{ return "hollow"; }}
int cudaStreamIsCapturing(void *s, int *c) {{ *c = 0; return 0; }}
int cudaStreamEndCapture(void *s, void **g) {{ *g = handle; return 0; }}
int cudaGraphInstantiate(void **g) {{ *g = handle; return 0; }}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) {{ *n = 2; return 0; }}
void *__cudaRegisterFatBinary(void *f) {{ return handle; }}
"""
_DRIVER = """
int cuInit(unsigned f) { return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = 0; return 0; }
int cuDeviceGetName(char *name, int n, int d) { strncpy(name, "hollow", n); return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
"""


def missing_tool() -> str | None:
    """What keeps the stubs from being made here, if anything does."""
    if not _provider().is_file():
        return "onnxruntime has no CUDA provider"
    return next((f"{tool} is missing" for tool in ("gcc", "nm") if shutil.which(tool) is None), None)


def make(folder: Path) -> Path:
    """Compile the stubs into `folder`, which then goes first in LD_LIBRARY_PATH."""
    folder.mkdir()
    names = _wanted()
    for library in _LIBRARIES:
        file, symbols = names[library]
        written = _CUDART if library == "cudart" else "static char handle[64];"
        known = set(re.findall(r"\b(\w+)\(", written))
        stubs = [_stub(symbol) for symbol in symbols if symbol not in known]
        _compile(folder, library, file, written + "\n".join(stubs))
    _compile(folder, "cuda", "libcuda.so.1", _DRIVER)
    return folder


def _provider() -> Path:
    return Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


def _wanted() -> dict[str, tuple[str, list[str]]]:
    """By library its file name and the functions that the provider takes from it."""
    needed = subprocess.run(["readelf", "-d", _provider()], capture_output=True, text=True, check=True).stdout
    files = {library: re.findall(rf"\[(lib{library}\.so\.\d+)\]", needed)[0] for library in _LIBRARIES}
    lines = subprocess.run(["nm", "-D", "--undefined-only", _provider()], capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, list[str]]] = {library: (file, []) for library, file in files.items()}
    for word in lines.stdout.split():
        symbol, _, file = word.partition("@")
        for library in _LIBRARIES:
            if file == files[library] or (library == "curand" and symbol.startswith("curand")):
                found[library][1].append(symbol)
    return found


def _stub(symbol: str) -> str:
    if "Create" in symbol:
        return f"int {symbol}(void **made) {{ *made = handle; return 0; }}"
    if symbol.endswith(("Name", "String")):
        return f'const char *{symbol}(int e) {{ return "hollow"; }}'
    return f"long {symbol}(void) {{ return 0; }}"


def _compile(folder: Path, library: str, file: str, code: str) -> None:
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text(f"#include <stdlib.h>\n#include <string.h>\n{code}\n")
    versions.write_text(f"{file} {{ global: *; }};\n")
    command = ["gcc", "-w", "-shared", "-fPIC", source, "-o", folder / file, f"-Wl,-soname,{file}"]
    subprocess.run([*command, f"-Wl,--version-script={versions}"], check=True)
