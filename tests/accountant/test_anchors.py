"""Anchors: the published note of the format, rotation, comparison, and forged notes.

Every fuzz run has its control: a broken verifier, in which the same run must find a forgery.
"""

from __future__ import annotations

import base64
import errno
import os
import resource
import shlex
import stat
import sys
from dataclasses import replace
from random import Random

import pytest

from accountant import anchors, merkle
from accountant.anchors import (
    Checkpoint,
    Head,
    compare,
    history,
    opened,
    publish,
    read_notes,
    sign,
)
from accountant.errors import AnchorInvalid, AnchorUnavailable, LedgerError
from accountant.notes import (
    Signer,
    VerifierKey,
    new_key,
    open_text,
    read_key,
    sign_text,
    unverified,
)

# golang.org/x/mod/sumdb/note, note_test.go
VERIFIER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SIGNER = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
SIGNATURE = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"

OLD, NEW, OTHER = (Signer("epsledger/survey", bytes([fill]) * 32) for fill in (1, 2, 3))
DIGESTS = {
    ("news", 1): b"\x11" * 32,
    ("news", 12): b"\x22" * 32,
    ("tips", 1): b"\x33" * 32,
    ("tips", 3): b"\x44" * 32,
}
CHECKPOINT = Checkpoint(
    "survey",
    tuple(Head(name, seq, DIGESTS[name, seq]) for name, seq in (("news", 12), ("tips", 3))),
)
NOTE = sign(CHECKPOINT, [OLD])


def handing_over(new=NEW, *lines):
    return replace(CHECKPOINT, lines=(f"key {new.verifier_key.to_text()}", *lines))


def lost(old=OLD):
    return f"lost {old.verifier_key.hash}"


# Keys and notes


def test_the_published_note():
    key, signer = VerifierKey.from_text(VERIFIER), Signer.from_text(SIGNER)
    assert signer.verifier_key == key
    assert (key.to_text(), signer.to_text()) == (VERIFIER, SIGNER)
    assert sign_text(TEXT, [signer]) == TEXT + "\n" + SIGNATURE
    assert open_text(TEXT + "\n" + SIGNATURE, [key]) == (TEXT, {key})


@pytest.mark.parametrize(("text", "kind"), [(VERIFIER, VerifierKey), (SIGNER, Signer)])
def test_mangled_keys_are_refused(text, kind):
    mangled = {text[:at] + chr(ord(text[at]) + 1) + text[at + 1 :] for at in range(len(text))}
    mangled |= {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    mangled |= {text + end for end in ("\n", "=", " ", "A", "+")} | {"", "é" + text}
    for key in mangled - {text}:
        with pytest.raises(AnchorInvalid) as caught:
            kind.from_text(key)
        assert SIGNER[-40:] not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [  # also published: a key too long and an unknown algorithm, their hashes adjusted
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ],
)
def test_published_bad_keys_are_refused(text):
    with pytest.raises(AnchorInvalid):
        VerifierKey.from_text(text)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "a\x00b", "a\ud800b"])
def test_bad_key_names_are_refused(name):
    with pytest.raises(AnchorInvalid, match="name"):
        Signer(name, bytes(32))


def test_the_seed_is_not_shown():
    assert repr(Signer("name", bytes(32))) == "Signer(name='name')"


def test_texts_may_have_empty_lines_and_any_script():
    text = "Ognuno sta solo\n\ned è subito sera.\n"
    assert open_text(sign_text(text, [OLD]), [OLD.verifier_key])[0] == text


@pytest.mark.parametrize("text", ["", "no end", "tab\t\n", "return\r\n", "half \ud800\n"])
def test_bad_texts_are_not_signed(text):
    with pytest.raises(AnchorInvalid):
        sign_text(text, [OLD])


def test_it_takes_a_signer():
    with pytest.raises(AnchorInvalid, match="signer"):
        sign_text(TEXT, [])


def test_signatures_of_strangers_are_ignored_and_never_enough():
    note = sign(CHECKPOINT, [OTHER, OLD])
    assert opened(note, [OLD.verifier_key]) == (CHECKPOINT, {OLD.verifier_key})
    assert opened(note, [OLD.verifier_key, OTHER.verifier_key])[1] == {
        OLD.verifier_key,
        OTHER.verifier_key,
    }
    for trusted in ([NEW.verifier_key], []):
        with pytest.raises(AnchorInvalid, match="no trusted key"):
            opened(note, trusted)


def test_a_wrong_signature_of_a_known_key_is_an_error_even_beside_a_right_one():
    wrong = sign(replace(CHECKPOINT, ledger="other"), [OTHER]).splitlines(keepends=True)[-1]
    for note in (NOTE + wrong, NOTE.replace("\n\n", "\n\n" + wrong)):
        assert opened(note, [OLD.verifier_key])[0] == CHECKPOINT
        with pytest.raises(AnchorInvalid, match="wrong"):
            opened(note, [OLD.verifier_key, OTHER.verifier_key])


@pytest.mark.parametrize(
    "end",
    [
        "",
        "— x\n",
        "— x AAAA\n",
        "— x AAAAAAAA=\n",
        "— a+b AAAAAAAA\n",
        "- x AAAAAAAA\n",
        "—  AAAAAAAA\n",
        "\n",
    ],
)
def test_malformed_signature_lines_are_refused(end):
    with pytest.raises(AnchorInvalid):
        opened(NOTE[:-1] if not end else NOTE + end, [OLD.verifier_key])


# Key files


def test_new_keys_are_private_and_read_back(tmp_path):
    path = tmp_path / "key"
    signer = new_key(path, "epsledger/survey")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path) == signer
    assert new_key(tmp_path / "second", "epsledger/survey") != signer


def test_no_key_is_overwritten(tmp_path):
    path = tmp_path / "key"
    signer = new_key(path, "name")
    with pytest.raises(AnchorUnavailable, match="another path") as caught:
        new_key(path, "name")
    assert caught.value.target == str(path)
    assert read_key(path) == signer


def test_new_keys_need_a_folder(tmp_path):
    with pytest.raises(AnchorUnavailable, match="No such file"):
        new_key(tmp_path / "no folder" / "key", "name")


def test_keys_and_their_folder_are_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(stat.S_IFMT(os.fstat(file).st_mode))
    )
    new_key(tmp_path / "key", "name")
    publish(NOTE, tmp_path / "anchors")
    assert synced == [stat.S_IFREG, stat.S_IFDIR] * 2


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_keys_that_others_may_use_are_refused(tmp_path, mode):
    path = tmp_path / "my key"
    new_key(path, "name")
    path.chmod(mode)
    with pytest.raises(AnchorUnavailable, match=f"chmod 600 '{path}'"):
        read_key(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", VERIFIER.encode(), SIGNER[:-1].encode(), SIGNER.encode() + b"\n\n"]
)
def test_files_that_are_no_key_are_refused_by_name(tmp_path, content):
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(AnchorInvalid, match="make a new key") as caught:
        read_key(path)
    assert caught.value.what == str(path)
    assert "AYEKFALV" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(AnchorUnavailable, match="No such file"):
        read_key(tmp_path / "key")


# Checkpoints


def test_the_layout():
    leaves = [
        f"head {h.budget} {h.seq} {base64.b64encode(h.digest).decode()}" for h in CHECKPOINT.heads
    ]
    text = handing_over().to_text()
    assert text.split("\n") == [
        "epsledger/survey",
        "2",
        base64.b64encode(merkle.root([leaf.encode() for leaf in leaves])).decode(),
        *leaves,
        f"key {NEW.verifier_key.to_text()}",
        "",
    ]
    assert Checkpoint.from_text(text) == handing_over()


def test_an_empty_ledger_has_the_empty_root():
    empty = Checkpoint("survey", ())
    assert empty.to_text() == "epsledger/survey\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"
    assert opened(sign(empty, [OLD]), [OLD.verifier_key])[0] == empty


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("head news 12 ", "head news 13 "),
        ("head news 12 ", "head news 012 "),
        ("head news 12 ", "head news 1_2 "),
        ("head news 12 ", "head news \uff11\uff12 "),
        ("head news 12 ", "head news -12 "),
        ("head news 12 ", "head news 0 "),
        ("head news 12 ", "head news 9223372036854775808 "),
        ("head news 12 ", "head news " + "9" * 5000 + " "),
        ("head news 12 ", "head  news 12 "),
        ("head news", "HEAD news"),
        ("head news", "head zoo"),
        ("head news", "head tips"),
        ("head news", "head ../news"),
        ("\n2\n", "\n1\n"),
        ("\n2\n", "\n3\n"),
        ("\n2\n", "\n-1\n"),
        ("\n2\n", "\n02\n"),
        ("\n2\n", "\ntwo\n"),
        ("epsledger/", ""),
        ("epsledger/", "epsledger/epsledger/"),
        ("epsledger/survey", "epsledger/"),
        ("=\nkey", "=\n\nkey"),
        ("=\nkey", "=\nhead news\nkey"),
        ("=\nkey", "=\nhead news 12 x\nkey"),
        ("=\nkey", "=\nepsledger/survey\nkey"),
        ("=\nkey", "=\n\u2028\nkey"),
    ],
)
def test_texts_that_differ_from_the_layout_are_refused(old, new):
    text = handing_over().to_text()
    assert old in text
    with pytest.raises(AnchorInvalid):
        Checkpoint.from_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "epsledger/survey\n",
        handing_over().to_text()[:-1],
        handing_over().to_text() + "\n",
    ],
)
def test_cut_texts_are_refused(text):
    with pytest.raises(AnchorInvalid):
        Checkpoint.from_text(text)


def test_the_order_of_names_is_fixed():
    with pytest.raises(AnchorInvalid, match="order"):
        Checkpoint("survey", CHECKPOINT.heads[::-1])
    with pytest.raises(AnchorInvalid, match="order"):
        Checkpoint("survey", CHECKPOINT.heads[:1] * 2)


# Rotation


def test_one_key_opens_a_whole_history():
    later = replace(CHECKPOINT, heads=CHECKPOINT.heads[:1])
    notes = [NOTE, sign(later, [OLD])]
    assert history(notes, OLD.verifier_key) == ((CHECKPOINT, later), OLD.verifier_key)
    assert history([], OLD.verifier_key) == ((), OLD.verifier_key)


def test_old_notes_open_with_the_keys_of_their_time():
    notes = [
        NOTE,
        sign(handing_over(NEW), [OLD, NEW]),
        sign(CHECKPOINT, [NEW]),
        sign(handing_over(OTHER), [NEW, OTHER]),
        sign(CHECKPOINT, [OTHER]),
    ]
    checkpoints, key = history(notes, OLD.verifier_key)
    assert len(checkpoints) == 5
    assert key == OTHER.verifier_key
    assert history(notes[2:], NEW.verifier_key)[1] == OTHER.verifier_key


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ([sign(CHECKPOINT, [NEW])], "note 1 .* no trusted key"),
        ([NOTE, sign(handing_over(), [OLD])], "note 2 .* new key .* did not sign"),
        ([NOTE, sign(handing_over(), [NEW])], "note 2 .* only the new key"),
        ([NOTE, sign(handing_over(), [OTHER])], "note 2 .* no trusted key"),
        ([NOTE, sign(handing_over(NEW, lost(OTHER)), [NEW])], "note 2 .* only the new key"),
        ([sign(handing_over(), [OLD, NEW]), NOTE], "note 2 .* no trusted key"),
        ([NOTE, sign(replace(CHECKPOINT, lines=(lost(),)), [OLD])], "note 2 .* lost one"),
        (
            [sign(handing_over(NEW, f"key {OTHER.verifier_key.to_text()}"), [OLD, NEW, OTHER])],
            "one new key",
        ),
        ([sign(replace(CHECKPOINT, lines=("key rubbish",)), [OLD])], "not of the form"),
        ([NOTE, sign(replace(CHECKPOINT, ledger="poll"), [OLD])], "note 2 .* another ledger"),
    ],
)
def test_handovers_without_the_signatures_they_take_are_refused(notes, reason):
    with pytest.raises(AnchorInvalid, match=reason):
        history(notes, OLD.verifier_key)


def test_a_lost_key_breaks_trust_until_a_person_vouches_for_the_new_one():
    notes = [NOTE, sign(handing_over(NEW, lost()), [NEW]), sign(CHECKPOINT, [NEW])]
    for vouched in ((), (OTHER.verifier_key,)):
        with pytest.raises(
            AnchorInvalid, match=r"note 2 .* declared lost here; get the new"
        ) as caught:
            history(notes, OLD.verifier_key, vouched=vouched)
        assert OLD.verifier_key.hash in str(caught.value)
    checkpoints, key = history(notes, OLD.verifier_key, vouched=[NEW.verifier_key])
    assert (len(checkpoints), key) == (3, NEW.verifier_key)


def test_vouching_does_not_excuse_a_note_that_declares_nothing_lost():
    for note in (sign(CHECKPOINT, [NEW]), sign(handing_over(), [NEW])):
        with pytest.raises(AnchorInvalid):
            history([NOTE, note], OLD.verifier_key, vouched=[NEW.verifier_key])


# Comparison


def at(digests):
    return lambda budget, seq: digests.get((budget, seq))


def test_a_ledger_that_went_on_extends_its_anchor():
    assert compare(CHECKPOINT, at(DIGESTS)) == ()
    assert compare(CHECKPOINT, at(DIGESTS | {("news", 13): b"", ("more", 1): b""})) == ()


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({("news", 12): None}, ["'news': entry 12 of the anchor is missing"]),
        ({("news", 12): bytes(32)}, ["'news': entry 12 differs"]),
        ({("tips", 1): None, ("tips", 3): None}, ["'tips': it is in the anchor, but not in"]),
        ({("news", 12): None, ("tips", 3): bytes(32)}, ["'news': entry 12 of", "'tips': entry 3"]),
    ],
)
def test_a_ledger_that_does_not_is_told_how(changes, problems):
    found = compare(CHECKPOINT, at(DIGESTS | changes))
    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))


# Publishing


def test_notes_are_appended_and_read_again(tmp_path):
    path = tmp_path / "anchors"
    notes = (NOTE, sign(handing_over(), [OLD, NEW]), NOTE)
    for count, note in enumerate(notes, 1):
        publish(note, str(path) if count == 1 else path)
        assert read_notes(path) == notes[:count]
    assert path.read_text(encoding="utf-8") == "".join(notes)


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(AnchorUnavailable, match="No such file"):
        publish(NOTE, tmp_path / "no folder" / "anchors")
    with pytest.raises(AnchorUnavailable, match="No such file"):
        read_notes(tmp_path / "anchors")


@pytest.mark.parametrize(
    "note",
    ["", TEXT, NOTE[:-1], NOTE + NOTE, sign_text(TEXT, [OLD]), NOTE.replace("news", "\ud800")],
)
def test_only_signed_checkpoints_are_published(tmp_path, note):
    with pytest.raises(AnchorInvalid):
        publish(note, tmp_path / "anchors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [5, NOTE.index("\n") + 1, NOTE.index("head"), len(NOTE) - 3])
def test_a_torn_note_is_found_and_its_line_named(tmp_path, kept):
    path = tmp_path / "anchors"
    path.write_text(NOTE + NOTE[:kept], encoding="utf-8")
    line = NOTE.count("\n") + 1
    with pytest.raises(AnchorInvalid, match=f"line {line};"):
        read_notes(path)
    with pytest.raises(AnchorInvalid, match=f"line {line};"):
        publish(NOTE, path)  # behind it, this one would be lost


def test_bytes_that_are_no_text_are_found(tmp_path):
    path = tmp_path / "anchors"
    path.write_bytes(NOTE.encode() + b"\xff")
    with pytest.raises(AnchorInvalid, match=f"byte {len(NOTE.encode())}"):
        read_notes(path)


def test_a_note_that_finds_no_room_leaves_nothing(tmp_path):
    path = tmp_path / "anchors"
    publish(NOTE, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(AnchorUnavailable, match="no room"):
            publish(NOTE, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_notes(path) == (NOTE,)


def test_a_note_that_is_not_durable_is_told(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(AnchorUnavailable, match="Input/output"):
        publish(NOTE, tmp_path / "anchors")


def command(program, *arguments):
    return "command:" + shlex.join([sys.executable, "-c", program, *map(str, arguments)])


def test_a_command_gets_the_note(tmp_path):
    got = tmp_path / "got"
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
    publish(NOTE, command(program, got))
    assert got.read_bytes() == NOTE.encode()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (command("import sys; sys.exit('no such bucket')"), "status 1: no such bucket"),
        (command("raise SystemExit(3)"), "status 3: nothing on standard error"),
        (command("import time; time.sleep(60)"), "timed out"),
        ("command:/no/such/program", "No such file"),
        ("command:", "cannot run it"),
        ("command:'", "cannot run it: No closing quotation"),
    ],
)
def test_a_command_that_fails_is_told(target, reason, monkeypatch):
    if reason == "timed out":  # and not on the others, which may start slowly
        monkeypatch.setattr(anchors, "COMMAND_SECONDS", 0.2)
    with pytest.raises(AnchorUnavailable, match=reason) as caught:
        publish(NOTE, target)
    assert caught.value.target == target
    assert isinstance(caught.value, LedgerError)


# Forgeries


def mutated(note, random):
    """Return the note with one accident: a bit, a line, or its end."""
    lines = note.splitlines(keepends=True)
    match random.randrange(8):
        case 0:
            one, two = random.sample(range(len(lines)), 2)
            lines[one], lines[two] = lines[two], lines[one]
        case 1:
            lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
        case 2:
            del lines[random.randrange(len(lines))]
        case 3:
            return note[: random.randrange(len(note))]
        case 4:
            one, two = sorted(random.sample(range(len(note)), 2))
            return note[:one] + note[two:]
        case _:
            content = bytearray(note.encode())
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            return content.decode(errors="replace")
    return "".join(lines)


def forgeries(verifier, note, count):
    """Return the mutated notes that a verifier opens as anything but what was signed."""
    random = Random(6962)
    expected, body = verifier(note), unverified(note)[0]
    found = []
    for _ in range(count):
        forged = mutated(note, random)
        try:
            result = verifier(forged)
        except AnchorInvalid:
            continue
        if result != expected or unverified(forged)[0] != body:
            found.append(forged)
    return found


def careful(note):
    return opened(note, [OLD.verifier_key, NEW.verifier_key])[0]


def unsigned(note):
    """Skip the signatures."""
    return Checkpoint.from_text(unverified(note)[0])


def heads_only(note):
    """Skip the signatures, and look only at what the root covers."""
    return unsigned(note).heads


FUZZED = sign(handing_over(), [OLD, OTHER])


def test_no_mutated_note_opens_as_another():
    assert careful(FUZZED) == handing_over()
    assert forgeries(careful, FUZZED, 20_000) == []


def test_control_a_verifier_that_skips_the_signatures_is_caught():
    assert forgeries(unsigned, FUZZED, 2_000)


def test_the_root_alone_covers_every_head():
    assert forgeries_of_heads(2_000) == []


def test_control_a_root_that_covers_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(merkle, "root", lambda _leaves: bytes(32))
    assert forgeries_of_heads(2_000)


def forgeries_of_heads(count):
    note = sign(handing_over(), [OLD])
    found = forgeries(heads_only, note, count)
    return [forged for forged in found if heads_only(forged) != CHECKPOINT.heads]
