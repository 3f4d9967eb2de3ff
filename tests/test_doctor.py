import json

import pytest

from edgekd import doctor


def facts(flags=(), arch="x86_64", gpus=(), missing=()):
    return {
        "cpu": {"model": "A CPU", "arch": arch, "cores_logical": 4, "cores_physical": 2, "cores_usable": 4, "flags": list(flags)},
        "memory_mib": 8192.0,
        "os": "Linux 6.1",
        "distribution": "Debian 12",
        "python": "3.11.7",
        "gpus": list(gpus),
        "gpu_reason": "" if gpus else "no NVIDIA driver is loaded",
        "backends": {
            "null": {"available": True, "version": "1", "reason": "", "hint": ""},
            **{
                name: {"available": False, "version": None, "reason": "gone", "hint": f"run: pip install {name}"}
                for name in missing
            },
        },
    }


@pytest.mark.parametrize(
    ("flags", "arch", "words"),
    [
        (["avx2", "avx512_vnni", "amx_int8"], "x86_64", "AMX"),
        (["avx2", "avx512f", "avx512_vnni"], "x86_64", "VNNI; wide convolutions run up to about 4 times"),
        (["avx2", "avx_vnni"], "x86_64", "VNNI; wide convolutions run up to about 4 times"),
        (["avx", "avx2"], "x86_64", "AVX2 without VNNI. Expect 1.5 to 2 times the speed of float32, not 4"),
        (["avx", "avx2"], "x86_64", "7 bits"),
        (["asimd", "asimddp"], "aarch64", "ARM's dot products"),
        (["asimd"], "aarch64", "at most 2 times"),
        ([], "x86_64", "not speed"),
    ],
)
def test_advice_about_int8(flags, arch, words):
    assert words in doctor.advise(facts(flags, arch))[0]


def test_advice_about_gpus_and_backends():
    gpu = {"name": "RTX 4090", "capability": "SM89", "memory_mib": 24576.0, "driver": "580.1"}
    assert "GPU RTX 4090 (SM89, driver 580.1) has INT8 and FP16 tensor cores." in doctor.advise(facts(gpus=[gpu]))
    assert any("named compute capabilities" in line for line in doctor.advise(facts()))
    assert "Backend openvino is not installed; run: pip install openvino" in doctor.advise(facts(missing=["openvino"]))
    advice = "Backend tensorrt is not installed; run: pip install tensorrt"
    assert advice in doctor.advise(facts(gpus=[gpu], missing=["tensorrt"]))
    assert advice not in doctor.advise(facts(missing=["tensorrt"])), "it would have no GPU to build for"


def test_lines_show_everything():
    text = "\n".join(doctor.lines(facts(["avx2"], missing=["openvino"])))
    for part in (
        "A CPU",
        "4 of 4 logical cores",
        "avx2",
        "8.0 GiB",
        "Debian 12",
        "3.11.7",
        "no NVIDIA driver",
        "null 1",
        "run: pip install",
    ):
        assert part in text


def test_this_machine():
    found = json.loads(json.dumps(doctor.inspect()))
    assert found["advice"][0].startswith("INT8: ")
    assert set(found["backends"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "null"}
    assert len(doctor.lines(found)) >= 9
