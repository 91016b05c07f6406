"""A record is read as it was written or is missing, whoever wrote it and whatever happened to the files."""

import os
import signal
import time

from conftest import start_fork, wait_for_fork

from hf_curriculum_distill.teachers.records import RecordStore
from teachers.test_cached import files

RECORDS = {bytes([i]) * 16: os.urandom(n) for i, n in enumerate((5, 1, 0, 12))}


def write_some(folder):
    RecordStore(folder).write(dict(list(RECORDS.items())[:2]))
    RecordStore(folder).write(dict(list(RECORDS.items())[2:]))  # a second writer, a second file


def read_all(folder):
    records = RecordStore(folder)
    found = {key: records.read(key) for key in RECORDS if key in records}
    return {key: bytes(value) for key, value in found.items() if value is not None}


def test_records_are_read_as_they_were_written_by_every_writer(tmp_path):
    write_some(tmp_path)
    assert read_all(tmp_path) == RECORDS
    assert len(files(tmp_path)) == 4


def test_no_flipped_bit_is_ever_read_as_a_value(tmp_path):
    write_some(tmp_path)
    for path, size in files(tmp_path).items():
        for bit in range(8 * size):
            with open(path, "r+b") as file:
                whole = file.read()
                flipped = bytearray(whole)
                flipped[bit // 8] ^= 1 << bit % 8
                file.seek(0)
                file.write(flipped)
            found = read_all(tmp_path)
            assert found.items() <= RECORDS.items() and len(found) >= 3, (path, bit)
            with open(path, "r+b") as file:
                file.write(whole)
    assert read_all(tmp_path) == RECORDS


def test_whatever_length_a_file_is_cut_to_only_what_was_cut_is_gone(tmp_path):
    write_some(tmp_path)
    for path, size in files(tmp_path).items():
        with open(path, "rb") as file:
            whole = file.read()
        for length in reversed(range(size)):
            os.truncate(path, length)
            found = read_all(tmp_path)
            assert found.items() <= RECORDS.items()
            sizes = [len(value) for value in RECORDS.values()][2 * ("000001" in path) :][:2]
            ends = [36, 72] if path.endswith(".index") else [sizes[0], sum(sizes)]
            assert len(found) == 2 + sum(end <= length for end in ends)  # the other file's, and what is whole
        with open(path, "wb") as file:
            file.write(whole)


def test_a_damaged_record_is_replaced_by_the_next_one_that_is_written(tmp_path):
    write_some(tmp_path)
    (first,) = [path for path in files(tmp_path) if path.endswith("000000.data")]
    with open(first, "r+b") as file:
        file.write(b"\0\0\0\0\0\0")
    key = next(iter(RECORDS))
    records = RecordStore(tmp_path)
    assert records.read(key) is None and key not in records
    records.write({key: RECORDS[key]})
    assert records.read(key) == RECORDS[key]
    assert RecordStore(tmp_path).read(key) == RECORDS[key]


def many(writer):
    """Records as large as real ones, that say what they hold."""
    for number in range(2000):
        key = f"{writer:8}{number:8}".encode()
        yield key, key * (1 + number % 300)


def write_many(folder, writer):
    records = RecordStore(folder)
    for key, value in many(writer):
        records.write({key: value})
        assert records.read(key) == value


def check_many(folder, writers):
    records, found = RecordStore(folder), 0
    for writer in range(writers):
        for key, value in many(writer):
            if key in records:
                assert records.read(key) == value
                found += 1
    return found


def test_a_process_killed_while_it_writes_leaves_whole_records_only(tmp_path):
    for writer in range(8):
        child = start_fork(write_many, tmp_path, writer)
        time.sleep(0.01 + 0.01 * writer)
        os.kill(child, signal.SIGKILL)
        assert wait_for_fork(child) == -signal.SIGKILL
        check_many(tmp_path, writer + 1)
    found = check_many(tmp_path, 8)
    assert 0 < found < 8 * 2000
    write_many(tmp_path, 8)
    assert check_many(tmp_path, 9) == found + 2000


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    children = [start_fork(write_many, tmp_path, writer) for writer in range(3)]
    assert [wait_for_fork(child) for child in children] == [0, 0, 0]
    assert check_many(tmp_path, 3) == 3 * 2000
