#!/bin/bash
# Put real Windows builds of CPython (x86-64), run by Wine, on this Debian machine.
#
#   windows-python.sh [DIR [VERSION...]]        default: /opt/winpy 3.11
#
# VERSION is 3.6 ... 3.14, or 3.13t / 3.14t for the free-threaded build. Makes
#
#   DIR/winpython          runs the first VERSION; call it like python
#   DIR/winpythonVERSION   runs that one
#   DIR/winpython-stop     ends the Wine session (it also ends by itself, 5 minutes after the last use)
#   DIR/prefix             the Wine prefix (drive C:); drive Z: is /
#   DIR/VERSION            one Python: python.exe, pythonXY.dll, DLLs/, Lib/, Lib/site-packages with pytest
#
# Needs root, apt and pip (and npm for 3.14), nothing else from outside. Safe to run again: what is there is kept.
#
# Where the parts come from:
# - Wine: Debian's wine64.
# - pythonXY.dll and the extension modules (_ctypes.pyd ...): python.org's own signed build, which the
#   win_amd64 wheels of panda3d carry in deploy_libs/ for freezing games. The rest of the wheel is dropped.
# - the standard library: the .py files of the same minor version, from (first found) a pyenv one, a
#   pythonX.Y on PATH, Debian's libpythonX.Y-stdlib, or, for 3.14, the npm package pyodide.
# - python.exe: 1.5 KB, written below. As PC/python.c: int wmain(c, v) { return Py_Main(c, v); }
set -euo pipefail

PANDA3D=1.10.16
PYODIDE=314.0.7 # CPython 3.14.2, which is what PANDA3D has too
# pytest, and what it needs on Windows, per minor version. In full: with --platform, pip takes environment markers
# from the Python that runs it, and not every index tells Requires-Python.
tools() {
    case $1 in
        3.6) echo pytest==7.0.1 pluggy==1.0.0 iniconfig==1.1.1 packaging==21.3 pyparsing==3.0.7 py==1.11.0 \
            attrs==22.2.0 tomli==1.2.3 colorama==0.4.5 importlib_metadata==4.8.3 zipp==3.6.0 \
            typing_extensions==4.1.1 atomicwrites==1.4.0 ;;
        3.7) echo pytest==7.4.4 pluggy==1.2.0 iniconfig==2.0.0 packaging==24.0 colorama==0.4.6 exceptiongroup==1.3.0 \
            tomli==2.0.1 importlib_metadata==6.7.0 zipp==3.15.0 typing_extensions==4.7.1 ;;
        3.8) echo pytest==8.3.5 pluggy==1.5.0 iniconfig==2.1.0 packaging==25.0 colorama==0.4.6 exceptiongroup==1.3.0 \
            tomli==2.2.1 typing_extensions==4.13.2 ;;
        *) echo pytest==8.4.2 pluggy==1.6.0 iniconfig==2.1.0 packaging==25.0 colorama==0.4.6 pygments==2.19.2 \
            exceptiongroup==1.3.0 tomli==2.2.1 typing_extensions==4.15.0 ;;
    esac
}

root=${1:-/opt/winpy}
shift || true
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(3.11)
mkdir -p "$root"
root=$(cd "$root" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
say() { echo "winpy: $*" >&2; }

# ---------------------------------------------------------------- Wine
wine=/usr/lib/wine/wine64 wineserver=/usr/lib/wine/wineserver64
if [ ! -x $wine ]; then
    say "installing wine64"
    apt-get update -qq >"$work/apt.log" 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends wine64 >>"$work/apt.log" 2>&1 ||
        { cat "$work/apt.log" >&2; exit 1; }
fi

cat >"$root/wine-env" <<EOF
# sourced by the launchers
export WINEPREFIX='$root/prefix' WINEARCH=win64 WINEDEBUG="\${WINEDEBUG:--all}" WINEDLLOVERRIDES='mscoree,mshtml='
unset DISPLAY WAYLAND_DISPLAY PYTHONHOME
case "\${LC_ALL:-\${LC_CTYPE:-\${LANG:-}}}" in *[Uu][Tt][Ff]*8*) ;; *) export LC_ALL=C.UTF-8 ;; esac
wine=$wine wineserver=$wineserver
EOF
. "$root/wine-env"

if [ ! -e "$root/prefix/.ready" ]; then
    say "making the Wine prefix"
    rm -rf "$root/prefix"
    $wine wineboot -i </dev/null >/dev/null 2>&1
    $wine winecfg -v win10 </dev/null >/dev/null 2>&1 # Debian's default is Windows 7
    $wineserver -k || true
    $wineserver -w
    # wineboot copied all of Wine's DLLs (690 MB): link them instead, and have Wine leave them so
    builtin=/usr/lib/x86_64-linux-gnu/wine/x86_64-windows
    for f in "$root"/prefix/drive_c/windows/system32/*; do
        b=$builtin/${f##*/}
        if [ -f "$f" ] && [ ! -L "$f" ] && cmp -s "$f" "$b"; then ln -sf "$b" "$f"; fi
    done
    echo disable >"$root/prefix/.update-timestamp"
    touch "$root/prefix/.ready"
fi

# ---------------------------------------------------------------- python.exe
cat >"$work/mkexe.py" <<'EOF'
"""mkexe.py PYTHONXY.DLL OUT: write a Windows x86-64 console program that calls the DLL's Py_Main."""
import struct
import sys

dll, out = sys.argv[1:]
imports = [
    (dll, ["Py_Main"]),
    ("ucrtbase.dll", ["_configure_wide_argv", "_initialize_wide_environment", "__p___argc", "__p___wargv", "exit"]),
]
BASE, RVA, ALIGN, RAW = 0x140000000, 0x1000, 0x200, 0x400

# the only section: the import tables, then the code
blob = bytearray(20 * (len(imports) + 1))


def add(data, align=8):
    blob.extend(bytes(-len(blob) % align))
    at = RVA + len(blob)
    blob.extend(data)
    return at


slot = {}
for i, (name, functions) in enumerate(imports):
    names = [add(b"\0\0" + f.encode() + b"\0", 2) for f in functions]
    thunks = struct.pack("<%dQ" % (len(names) + 1), *(names + [0]))
    lookup, iat = add(thunks), add(thunks)
    slot.update((f, iat + 8 * j) for j, f in enumerate(functions))
    struct.pack_into("<5I", blob, 20 * i, lookup, 0, 0, add(name.encode() + b"\0", 1), iat)

entry = add(b"", 16)
code = bytearray()


def call(function):  # call [rip + x]
    code.extend(b"\xff\x15" + struct.pack("<i", slot[function] - (entry + len(code) + 6)))


code += b"\x48\x83\xec\x28"      # sub rsp, 40
code += b"\xb9\x01\x00\x00\x00"  # mov ecx, 1 (_crt_argv_unexpanded_arguments)
call("_configure_wide_argv")
call("_initialize_wide_environment")
call("__p___argc")
code += b"\x8b\x18"              # mov ebx, [rax]
call("__p___wargv")
code += b"\x48\x8b\x10"          # mov rdx, [rax]
code += b"\x89\xd9"              # mov ecx, ebx
call("Py_Main")
code += b"\x89\xc1"              # mov ecx, eax
call("exit")
add(code, 16)

size = len(blob)
blob.extend(bytes(-size % ALIGN))
image = RVA + size + -size % 0x1000
header = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0"
header += struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x22)  # x86-64, 1 section, executable, large addresses
header += struct.pack("<HBBIIIII", 0x20B, 14, 0, len(blob), 0, 0, entry, RVA)
header += struct.pack("<QIIHHHHHHIIIIHH", BASE, 0x1000, ALIGN, 6, 0, 0, 0, 6, 0, 0, image, RAW, 0, 3, 0x8100)
header += struct.pack("<QQQQII", 2000000, 0x1000, 0x100000, 0x1000, 0, 16)  # stack, heap, 16 directories
header += struct.pack("<4I", 0, 0, RVA, 20 * (len(imports) + 1)) + bytes(14 * 8)
header += struct.pack("<8s6IHHI", b".text", size, RVA, len(blob), RAW, 0, 0, 0, 0, 0xE0000020)
with open(out, "wb") as f:
    f.write(header + bytes(RAW - len(header)) + blob)
EOF

# ---------------------------------------------------------------- one Python
find_stdlib() { # find_stdlib X.Y: print the folder of its standard library
    local v=$1 d p deb
    if [ -n "${WINPY_STDLIB:-}" ]; then echo "$WINPY_STDLIB"; return; fi
    d=$(python$v -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' 2>/dev/null) || d=
    # Debian's own python3 may lack parts of the library, so a pyenv one goes first
    for p in ~/.pyenv/versions/"$v".*/lib/python"$v"; do
        [ -f "$p/os.py" ] && { echo "$p"; return; }
    done
    [ -n "$d" ] && [ -f "$d/asyncio/windows_events.py" ] && { echo "$d"; return; }
    if (cd "$work" && apt-get download -qq "libpython$v-minimal" "libpython$v-stdlib" >/dev/null 2>&1); then
        for deb in "$work"/libpython"$v"-*.deb; do dpkg -x "$deb" "$work/deb"; done
        echo "$work/deb/usr/lib/python$v"
        return
    fi
    if [ "$v" = 3.14 ]; then
        (cd "$work" && npm pack --silent "pyodide@$PYODIDE" >/dev/null && tar xzf "pyodide-$PYODIDE.tgz" package/python_stdlib.zip)
        "$python" -m zipfile -e "$work/package/python_stdlib.zip" "$work/pyodide"
        (cd "$work/pyodide" && rm -rf _ssl.py _pyodide pyodide _sysconfigdata*)
        echo "$work/pyodide"
        return
    fi
    return 1
}

install_python() {
    local version=$1 minor=${1%t} here=$root/$1 tag abi dll stdlib x
    tag=cp${minor/./}
    abi=$tag${version#"$minor"}
    case $minor in 3.6 | 3.7) abi=${abi}m ;; esac
    dll=python${minor/./}${version#"$minor"}.dll
    if [ -e "$here/.ready" ]; then say "$version is there"; return; fi
    say "fetching $version (65 to 70 MB, of which 20 are kept)"
    rm -rf "$here" "$work/wheel" "$work/x"
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheel" \
        --platform win_amd64 --python-version "$minor" --implementation cp --abi "$abi" "panda3d==$PANDA3D" \
        2>"$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }
    "$python" - "$work"/wheel/*.whl "$work" <<'EOF'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as z:
    z.extractall(sys.argv[2] + "/x", [n for n in z.namelist() if n.startswith("deploy_libs/")])
EOF
    rm -rf "$work/wheel"
    mkdir -p "$here/DLLs" "$here/Lib"
    x=$work/x/deploy_libs
    mv "$x/$dll" "$here/"
    case $version in # the wheels of 3.13 and 3.14 have both kinds
        *t) mv "$x"/*.$abi-win_amd64.pyd "$here/DLLs/" ;;
        *) rm -f "$x"/*.cp3*t-win_amd64.pyd && mv "$x"/*.pyd "$here/DLLs/" ;;
    esac
    find "$x" \( -name 'lib*.dll' -o -name sqlite3.dll \) -exec mv -t "$here/DLLs" {} + # libffi, OpenSSL
    rm -rf "$x" "$here"/DLLs/{_tkinter,_msi,_test,_ctypes_test,winsound}*

    stdlib=$(find_stdlib "$minor") || { say "no standard library found for $minor"; exit 1; }
    say "standard library from $stdlib"
    tar -C "$stdlib" -c --exclude=./site-packages --exclude=./dist-packages --exclude=./test --exclude=./tests \
        --exclude=./idlelib --exclude=./tkinter --exclude=./turtle* --exclude=./ensurepip --exclude=./lib2to3 \
        --exclude=./lib-dynload --exclude=./config-* --exclude=./curses --exclude=./_sysconfigdata* \
        --exclude=./*/tests --exclude=./*/test --exclude=__pycache__ . | tar -C "$here/Lib" -x
    mkdir -p "$here/Lib/site-packages"
    "$python" "$work/mkexe.py" "$dll" "$here/python.exe"
    cat >"$here/python.exe.manifest" <<'EOF'
<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
  <compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1">
    <application>
      <supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/>
    </application>
  </compatibility>
</assembly>
EOF
    # shellcheck disable=SC2046
    "$python" -m pip install -q --disable-pip-version-check --no-deps --only-binary=:all: --no-compile \
        --platform win_amd64 --python-version "$minor" --implementation cp --abi "$abi" --abi none \
        --target "$here/Lib/site-packages" $(tools "$minor") 2>"$work/pip.log" ||
        { cat "$work/pip.log" >&2; exit 1; }
    rm -rf "$here/Lib/site-packages/bin"
    env -u PYTHONDONTWRITEBYTECODE "$root/winpython$version" -m compileall -qq "$here/Lib" >/dev/null 2>&1 </dev/null || true
    touch "$here/.ready"
}

# ---------------------------------------------------------------- launchers
cat >"$root/launch" <<'EOF'
#!/bin/bash
# winpythonX.Y is a link to this
self=$(readlink -f "$0")
root=${self%/*}
. "$root/wine-env"
version=${0##*/winpython}
exe=$root/${version:-$(<"$root/default")}/python.exe

# a Wine session outlives the program that starts it and keeps that one's output open (a pipe's reader then waits
# for minutes): so start it apart, and one at a time
exec 5>"$WINEPREFIX/.lock"
flock 5
if ! $wineserver -k0 2>/dev/null; then
    $wineserver -p300 </dev/null >/dev/null 2>&1 5>&-
    $wine cmd /c exit </dev/null >/dev/null 2>&1 5>&-
fi
exec 5>&-

# /a:/b becomes Z:/a;Z:/b
case "${PYTHONPATH:-}" in
    *[\;\\]* | [A-Za-z]:* | '') ;;
    *) PYTHONPATH=Z:${PYTHONPATH//:/;Z:} && export PYTHONPATH=${PYTHONPATH//Z:;/} ;;
esac

# Wine 8 cannot fstat a regular file (or a closed handle) that it inherits from outside, and Python then does not
# start: put a pipe between
[ -e /dev/fd/0 ] || exec </dev/null
[ -e /dev/fd/1 ] || exec >/dev/null
[ -e /dev/fd/2 ] || exec 2>/dev/null
[ -f /dev/fd/0 ] && exec 7<&0 0< <(exec cat <&7) 7<&-
needs_pipe() { [ -f /dev/fd/$1 ] || [ -t $1 ]; }
if ! needs_pipe 1 && ! needs_pipe 2; then exec $wine "$exe" "$@"; fi
cats=()
exec 8>&1 9>&2
if needs_pipe 1; then exec 1> >(trap '' INT; exec cat >&8 8>&- 9>&-); cats+=($!); fi
if needs_pipe 2; then
    if [ /dev/fd/8 -ef /dev/fd/9 ]; then exec 2>&1; else exec 2> >(trap '' INT; exec cat >&9 8>&- 9>&-); cats+=($!); fi
fi
$wine "$exe" "$@" <&0 8>&- 9>&- &
child=$!
trap 'kill -TERM $child' TERM
trap 'kill -INT $child' INT
trap 'kill -HUP $child' HUP
while :; do
    wait $child
    rc=$?
    kill -0 $child 2>/dev/null || break
done
exec 1>&8 2>&9 8>&- 9>&-
for ((i = 0; i < 100; i++)); do # a program that it left behind may hold the pipe
    kill -0 "${cats[@]}" 2>/dev/null || break
    sleep 0.02
done
exit $rc
EOF
chmod +x "$root/launch"
cat >"$root/winpython-stop" <<'EOF'
#!/bin/bash
. "$(dirname "$(readlink -f "$0")")/wine-env"
$wineserver -k
$wineserver -w
EOF
chmod +x "$root/winpython-stop"
echo "${versions[0]}" >"$root/default"
ln -sfn launch "$root/winpython"
for v in "${versions[@]}"; do
    ln -sfn launch "$root/winpython$v"
    install_python "$v"
    "$root/winpython$v" -c 'import asyncio, ctypes, mmap, multiprocessing, subprocess, sys; print("winpy:", sys.version, sys.platform)' | cat >&2
done
du -sh "$root" | sed 's/^/winpy: /' >&2
