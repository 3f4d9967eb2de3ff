"""What a run says of engines that compression did not make faster."""

from edgekd.deployment import slower_than_float

FLOAT = {"backend_name": "openvino", "role": "student", "precision": "float32"}
INT8 = {"backend_name": "openvino", "role": "student", "precision": "int8"}
TEACHER = {"backend_name": "openvino", "role": "teacher", "precision": "float32"}


def ratio(engine, verdict):
    return {"engine": engine, "reference": 0, "speedup": 0.8, "interval": [0.78, 0.82], "verdict": verdict}


def test_an_int8_engine_slower_than_its_twin_is_a_failure_with_the_numbers():
    (line,) = slower_than_float([FLOAT, INT8, TEACHER], [ratio(1, "slower"), ratio(2, "slower")])
    assert line.startswith("openvino int8: slower than its float32 twin: 0.80 times its speed [0.78, 0.82]")


def test_faster_or_no_difference_is_none():
    assert slower_than_float([FLOAT, INT8], [ratio(1, "faster")]) == []
    assert slower_than_float([FLOAT, INT8], [ratio(1, "no difference")]) == []


def test_without_its_twin_nothing_is_said():
    assert slower_than_float([INT8, TEACHER], [ratio(1, "slower")]) == []
