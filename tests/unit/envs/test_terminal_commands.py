"""Terminal: what commands do and how they complain, per operating system, and the reference's quirks."""

from __future__ import annotations

import pytest
from terminal_worlds import HOST, LOGIN, error, run, tree, world

from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.filesystem import MAX_NODES, weight
from cod_async.envs.terminal.machine import OS_NAMES, Os
from cod_async.envs.terminal.terminal import ALIASES, MAX_OUTPUT_CHARS, NOT_ON_WINDOWS

WINDOWS_MISSING = "The system cannot find the file specified."


@pytest.mark.parametrize(
    ("os", "line", "words"),
    [
        ("linux", "frobnicate", "bash: frobnicate: command not found"),
        ("mac", "frobnicate", "zsh: command not found: frobnicate"),
        (
            "windows",
            "frobnicate x",
            "'frobnicate' is not recognized as an internal or external command,\noperable program",
        ),
        ("linux", "ls nope", "ls: cannot access 'nope': No such file or directory"),
        ("mac", "ls nope", "ls: nope: No such file or directory"),
        ("windows", "dir nope", WINDOWS_MISSING),
        ("linux", "cat docs", "cat: docs: Is a directory"),
        ("linux", "cd nope", "bash: cd: nope: No such file or directory"),
        ("mac", "cd docs/a.txt", "zsh: cd: docs/a.txt: Not a directory"),
        ("windows", "cd nope", "The system cannot find the path specified."),
        ("windows", "cd D:\\", "The system cannot find the drive specified."),
        ("linux", "mkdir docs", "mkdir: cannot create directory 'docs': File exists"),
        ("linux", "mkdir x/y", "mkdir: cannot create directory 'x/y': No such file or directory"),
        ("windows", "mkdir docs", "A subdirectory or file docs already exists."),
        ("linux", "cp nope x", "cp: cannot stat 'nope': No such file or directory"),
        ("linux", "cp docs x", "cp: -r not specified; omitting directory 'docs'"),
        ("mac", "cp docs x", "cp: docs is a directory (not copied)."),
        ("linux", "cp docs/a.txt docs", "cp: 'docs/a.txt' and 'docs' are the same file"),
        (
            "linux",
            "mv docs docs/x",
            "mv: cannot move 'docs' to 'docs/x': cannot copy or move a directory into itself",
        ),
        ("linux", "mv docs/a.txt x/y", "mv: cannot move 'docs/a.txt' to 'x/y': No such file or directory"),
        ("linux", "rm docs", "rm: cannot remove 'docs': Is a directory"),
        ("windows", "del nope", WINDOWS_MISSING),
        ("windows", "del docs", "Access is denied."),
        ("linux", "rm", "rm: missing operand"),
        ("linux", "cp a", "cp: missing destination file operand after 'a'"),
        ("windows", "copy a", "The syntax of the command is incorrect."),
        ("linux", "chmod +x docs/a.txt", "chmod: invalid mode: '+x'"),
        ("linux", "chmod 888 docs/a.txt", "chmod: invalid mode: '888'"),
        ("linux", "ls --frob", "ls: unrecognized option '--frob'"),
        ("linux", "ls -lq", "ls: invalid option -- 'q'"),
        ("linux", "tar -xf nope.tar", "tar: nope.tar: Cannot open: No such file or directory"),
        ("linux", "tar xf docs/a.txt", "tar: This does not look like a tar archive"),
        ("linux", "tar docs", "tar: invalid option -- 'd'"),
        ("linux", "tar", "tar: You must specify one of the '-ctx' options"),
        ("linux", "unzip nope", "unzip:  cannot find or open nope, nope.zip or nope.ZIP."),
        ("linux", "zip x nope", "\tzip warning: name not matched: nope"),
        ("linux", "gunzip docs/a.txt", "gunzip: docs/a.txt: unknown suffix -- ignored"),
        ("linux", f"ssh bob@{HOST}", f"bob@{HOST}: Permission denied (publickey)."),
        ("linux", f"ssh {HOST}", f"user@{HOST}: Permission denied (publickey)."),
        ("linux", "ssh ops@10.0.0.1", "ssh: connect to host 10.0.0.1 port 22: Connection timed out"),
        ("linux", "ssh ops@web", "ssh: Could not resolve hostname web: Name or service not known"),
        ("windows", f"scp nope {LOGIN}:docs", "scp: nope: No such file or directory"),
        ("linux", f"scp docs {LOGIN}:docs", "scp: docs: not a regular file"),
        ("linux", f"scp docs/a.txt {LOGIN}:nope/x", "scp: nope/x: No such file or directory"),
        (
            "linux",
            "scp docs/a.txt ops@10.0.0.1:",
            "ssh: connect to host 10.0.0.1 port 22: Connection timed out",
        ),
        ("linux", "scp docs/a.txt src", "scp: exactly one side must be remote (user@host:path)"),
        ("linux", f"scp {LOGIN}:docs {LOGIN}:src", "scp: exactly one side must be remote (user@host:path)"),
        ("linux", "exit", "bash: exit: not in a remote session"),
    ],
)
def test_native_words(os: Os, line: str, words: str) -> None:
    terminal = world(os)
    before = tree(terminal.local), tree(terminal.remote)
    assert error(terminal, line).startswith(words)
    assert (tree(terminal.local), tree(terminal.remote)) == before


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_availability(name: str) -> None:
    """Everything exists everywhere, but for six commands on a local Windows machine."""
    for os in OS_NAMES:
        is_known = "not" not in world(os).run(name).output.replace("not in a remote", "").split()
        assert is_known == (os != "windows" or name not in NOT_ON_WINDOWS)
    remote = world("windows")
    remote.connect()
    assert "command not found" not in remote.run(name).output


def test_aliases() -> None:
    assert set(ALIASES) == {"dir", "type", "copy", "move", "ren", "rename", "del"}
    terminal = world("windows")
    run(terminal, "copy docs\\a.txt c.txt", "REN c.txt d.txt", "move d.txt src", "del /q docs\\b.txt")
    assert set(tree(terminal.local)) == {"docs", "docs/a.txt", "src", "src/d.txt", "src/main.py"}
    assert run(terminal, "TYPE SRC\\D.TXT") == "text of a.txt"


def test_prompts() -> None:
    windows, mac, linux = (world(os) for os in OS_NAMES)
    assert windows.current.prompt() == "C:\\Users\\user>"
    assert mac.current.prompt() == "user@MacBook ~ %"
    assert linux.current.prompt() == "user@laptop:~$"
    for terminal in (windows, mac, linux):
        run(terminal, "cd docs")
    assert windows.current.prompt() == "C:\\Users\\user\\docs>"
    assert mac.current.prompt() == "user@MacBook ~/docs %"
    run(linux, "cd /home")
    assert linux.current.prompt() == "user@laptop:/home$"
    run(windows, f"ssh {LOGIN}", "cd docs")
    assert windows.current.prompt() == f"ops@{HOST}:~/docs$"
    run(windows, "exit")
    assert windows.current.prompt() == "C:\\Users\\user\\docs>"


def test_listings() -> None:
    terminal = world()
    assert run(terminal, "ls") == "docs/\nsrc/"
    assert run(terminal, "chmod 640 docs/a.txt; ls -l docs").splitlines()[:2] == [
        "total 2",
        "-rw-r----- 1 user user    1024 Jan 15 10:00 a.txt",
    ]
    assert run(terminal, "touch .x y; ls") == "docs/\nsrc/\ny"
    assert run(terminal, "ls -a") == ".\n..\n.x\ndocs/\nsrc/\ny"
    assert run(terminal, "ls docs src") == "docs:\na.txt\nb.txt\n\nsrc:\nmain.py"
    assert run(terminal, "ls -d docs") == "docs/"
    table = run(world("windows"), "dir docs")
    assert table.startswith(
        " Directory of C:\\Users\\user\\docs\n\n01/15/2026  10:00 AM             1,024 a.txt\n"
    )
    assert table.endswith("               2 File(s)          2,048 bytes\n               0 Dir(s)")


def test_listing_is_cut_at_fifty() -> None:
    terminal = world()
    for start in range(0, 80, 40):
        run(terminal, "touch " + " ".join(f"f{i:02}" for i in range(start, start + 40)))
    for line, count in (("ls", 51), ("ls -l", 52), ("ls -d " + " ".join(f"f{i:02}" for i in range(40)), 40)):
        assert len(run(terminal, line).splitlines()) == count
    assert run(terminal, "ls").endswith("... (32 more)")


def test_and_stops_the_whole_line_semicolon_goes_on() -> None:
    terminal = world()
    assert terminal.run("cat nope; whoami").output == "cat: nope: No such file or directory\nuser"
    stopped = terminal.run("cat nope && whoami ; pwd")
    assert stopped.output == "cat: nope: No such file or directory" and stopped.is_error
    assert run(terminal, "whoami && pwd ; whoami") == "user\n/home/user\nuser"
    assert not terminal.run("cat nope ; pwd").is_error


def test_nothing_of_a_refused_line_runs() -> None:
    terminal = world()
    before = tree(terminal.local)
    for line in (
        "rm -r docs | cat",
        "rm -r docs > x",
        "rm -r docs; ls *",
        "rm -r docs && echo 'x",
        "rm -r docs &",
    ):
        error(terminal, line)
        assert tree(terminal.local) == before


def test_sessions() -> None:
    terminal = world("mac")
    assert run(terminal, "cd docs", f"ssh {LOGIN} && pwd").endswith("/home/ops")
    assert error(terminal, f"ssh {LOGIN}").startswith(
        f"ssh: connect to host {HOST} port 22: Connection refused"
    )
    assert "local machine" in error(terminal, "scp docs/a.txt user@mac:x")
    assert run(terminal, "cd docs", "exit; pwd").endswith("/Users/user/docs")
    assert run(terminal, f"ssh {LOGIN}", "pwd") == "/home/ops"  # a new session starts at home
    run(terminal, "exit")
    assert run(terminal, f"ssh -p 22 -o Batch=yes {LOGIN} 'mkdir -p z/y && ls z'") == "y/"
    assert not terminal.is_remote and "z/y" in tree(terminal.remote)
    assert error(terminal, f"ssh {LOGIN} cat nope") == "cat: nope: No such file or directory"
    assert run(terminal, f"scp docs {LOGIN}:z; ssh {LOGIN} exit; whoami").endswith("user")


def test_transfers() -> None:
    terminal = world("windows")
    run(terminal, "mkdir in", "cd docs")
    run(terminal, f"scp a.txt {LOGIN}:", f"scp C:\\Users\\user\\docs\\b.txt {LOGIN}:/home/ops/src/c.txt")
    run(terminal, f"scp -r ..\\docs nobody@{HOST}:/opt", f"scp -r {LOGIN}:src ..\\in")
    remote = tree(terminal.remote)
    assert remote["a.txt"] == "text of a.txt" and remote["src/c.txt"] == "text of b.txt"
    assert terminal.remote.files.is_directory(("opt", "docs"))
    assert {"in/src/main.py", "in/src/c.txt"} <= set(tree(terminal.local))
    terminal = world()
    run(
        terminal,
        "chmod 600 docs/a.txt",
        f"scp docs/a.txt {LOGIN}:k",
        f"scp docs/a.txt src/main.py {LOGIN}:docs",
    )
    assert "-rw-------" in run(terminal, f"ssh {LOGIN} ls -l k")  # modes travel
    assert tree(terminal.remote)["docs/main.py"] == "text of main.py"
    run(terminal, f"rsync -av docs {LOGIN}:one", f"rsync -av docs/ {LOGIN}:two")
    assert {"one/a.txt", "two/a.txt"} <= set(tree(terminal.remote)) and "two/docs" not in tree(
        terminal.remote
    )


def test_archives_travel_and_unpack_elsewhere() -> None:
    for pack, unpack in (("zip -rq x.zip docs", "unzip x.zip"), ("tar czf x.tgz docs", "tar -xf x.tgz")):
        terminal = world("mac")
        archive = pack.split()[2]
        run(terminal, pack, f"scp {archive} {LOGIN}:src", f"ssh {LOGIN}", "cd src", unpack)
        assert {"src/docs/a.txt", "src/docs/b.txt"} <= set(tree(terminal.remote))


def test_bsd_tar_reads_zip_and_gnu_tar_does_not() -> None:
    assert run(world("mac"), "zip -rq x.zip docs; tar tf x.zip").splitlines()[0] == "docs/"
    assert "does not look like" in error(world("linux"), "zip -rq x.zip docs; tar tf x.zip")


def test_members_are_named_from_the_base_name() -> None:
    for line in ("tar cf x.tar /home/user/docs; tar tf x.tar", "zip -rq x /home/user/docs; unzip -l x.zip"):
        assert run(world(), line) == "docs/\ndocs/a.txt\ndocs/b.txt"
    assert run(world(), "cd docs; tar cf ../x.tar . ; tar tf ../x.tar") == "a.txt\nb.txt"


def test_tar_directory_is_ignored_by_the_reference_only() -> None:
    lines = ("mkdir out", "tar -cf x.tar docs", "rm -r docs", "tar -xf x.tar -C out")
    terminal = world()
    run(terminal, *lines)
    assert "out/docs/a.txt" in tree(terminal.local) and "docs" not in tree(terminal.local)
    terminal = world(is_parity=True)
    run(terminal, *lines)
    assert "docs/a.txt" in tree(terminal.local) and "out/docs" not in tree(terminal.local)
    assert run(world(), "tar -cf x.tar -C docs a.txt; tar tf x.tar") == "a.txt"
    terminal = world(is_parity=True)
    error(terminal, "tar -cf x.tar -C docs a.txt")
    assert run(terminal, "tar tf x.tar") == "docs/\ndocs/a.txt\ndocs/b.txt"


@pytest.mark.parametrize(
    ("os", "line", "parity_words"),
    [
        ("linux", f"scp docs/a.txt {LOGIN}:~/src", "scp: ~/src: No such file or directory"),
        ("mac", f"rsync docs/a.txt {LOGIN}:~/src/", "rsync: ~/src/: No such file or directory"),
        ("windows", f"scp {LOGIN}:~/src/main.py docs", "scp: ~/src/main.py: No such file or directory"),
        ("windows", 'type "docs\\a.txt"', WINDOWS_MISSING),
        ("windows", 'copy "C:\\Users\\user\\docs\\a.txt" src', WINDOWS_MISSING),
        ("linux", "cp docs/a.txt docs/b.txt src", "cp: expected a source and a destination"),
        ("linux", "echo rm: gone && ls", "rm: gone"),
        ("windows", "del /q docs\\a.txt", WINDOWS_MISSING),
        ("linux", "chmod 0600 docs/a.txt", "chmod: invalid mode: '0600'"),
    ],
)
def test_works_by_default_and_fails_under_parity(os: Os, line: str, parity_words: str) -> None:
    run(world(os), line)
    assert parity_words in error(world(os, is_parity=True), line)


def test_other_quirks_of_parity() -> None:
    for is_parity, where in ((False, "docs/z.txt"), (True, "z.txt")):
        terminal = world("windows", is_parity)
        run(terminal, "ren C:\\Users\\user\\docs\\a.txt z.txt")
        assert where in tree(terminal.local)
        terminal = world("linux", is_parity)
        assert run(terminal, "echo '$USER'") == ("user" if is_parity else "$USER")
        moved = terminal.run(f"ssh {LOGIN} && cd ~ && pwd")  # the reference expands with the local home
        assert moved.output.endswith("/home/ops") != is_parity and moved.is_error == is_parity


def test_case_of_names() -> None:
    for os in ("windows", "mac"):
        terminal = world(os)
        assert run(terminal, "cat DOCS/A.TXT") == "text of a.txt"
        run(terminal, "mv docs/a.txt docs/A.txt")
        assert {"docs/A.txt", "docs/b.txt"} < set(tree(terminal.local)) and "docs/a.txt" not in tree(
            terminal.local
        )
    error(world("linux"), "cat DOCS/A.TXT")
    terminal = world("windows")  # names that differ on Linux only by case are one on Windows
    run(terminal, f"ssh {LOGIN} touch docs/A.txt", f"scp -r {LOGIN}:docs in", "type in\\a.txt")
    assert {"in/a.txt", "in/b.txt"} <= set(tree(terminal.local))


def test_current_directory_is_not_removed() -> None:
    terminal = world()
    run(terminal, "cd docs")
    for line in ("rm -r .", "rm -rf ..", "rm -rf /", "rm -rf /home/user/docs"):
        assert "refusing to remove" in error(terminal, line)


def test_a_disk_fills_up() -> None:
    terminal = world()
    for step in range(20):
        result = terminal.run(f"cp -r docs d{step}; cp -r d{step} docs/e{step}")
    assert "No space left on device" in result.output
    assert weight(terminal.local.files.root) == terminal.local.files.num_nodes <= MAX_NODES
    run(terminal, "rm -r docs; touch works")


def test_depth_and_length_have_limits() -> None:
    terminal = world()
    assert "File name too long" in error(terminal, "mkdir " + "x" * 256)
    assert "File name too long" in error(terminal, "mkdir -p " + "x/" * 41)
    run(terminal, "mkdir -p " + "x/" * 30, "mkdir -p " + "y/" * 30)
    assert "File name too long" in error(terminal, "mv y " + "x/" * 29)
    assert "y" in tree(terminal.local)  # it is still where it was
    run(terminal, "rm -rf x")
    assert "line is longer" in error(terminal, "echo " + "x" * 5_000)
    assert "argument list too long" in error(terminal, "echo " + "x " * 60)
    assert "too many commands" in error(terminal, "ls;" * 17)


def test_output_is_cut() -> None:
    terminal = world()
    output = terminal.run("; ".join(["echo " + "x" * 500] * 8 + ["echo $HOME$HOME"])).output
    assert len(output) < MAX_OUTPUT_CHARS + 30 and output.endswith("... (output cut)")


def test_a_line_that_does_too_much_is_killed() -> None:
    terminal = world()
    for step in range(6):
        run(terminal, f"cp -r docs d{step}", f"mv d{step} docs")
    line = "; ".join(["zip -rq x.zip " + " ".join(["docs"] * 40)] * 16)
    assert "Killed" in error(terminal, line)
    run(terminal, "ls")
