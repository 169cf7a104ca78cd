//! What a newcomer types, typed: the commands of transcript.md with a real Consul and three servers of Python's, and what
//! they answer.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use portcullis_testing::Consul;
use portcullis_testing::process::{free_port, scratch_folder};

const TRANSCRIPT: &str = include_str!("../transcript.md");

/// A shell with all that it starts, in a process group of their own.
struct Shell(Child);

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{}", self.0.id())]).stderr(Stdio::null()).status();
        let _ = self.0.wait();
    }
}

/// Each command, and what comes back.
fn commands(text: &str) -> Vec<(String, Vec<&str>)> {
    let mut commands: Vec<(String, Vec<&str>)> = Vec::new();
    let blocks = text.split("```").skip(1).step_by(2);
    for line in blocks.flat_map(|block| block.lines().skip(1)) {
        match (line.strip_prefix("$ "), line.strip_prefix('>'), commands.last_mut()) {
            (Some(command), ..) => commands.push((command.to_owned(), Vec::new())),
            (None, Some(more), Some((command, answer))) if answer.is_empty() => {
                command.push('\n');
                command.push_str(more.strip_prefix(' ').unwrap_or(more));
            }
            (None, _, Some((_, answer))) => answer.push(line),
            (None, _, None) => panic!("nothing was typed before {line:?}"),
        }
    }
    commands
}

/// Whether `said` is as `expected`, where … stands for anything, in a line or for lines.
fn is_as(said: &[&str], expected: &[&str]) -> bool {
    let line_is_as = |said: &str, expected: &str| match expected.split_once('…') {
        None => said == expected,
        Some((start, end)) => {
            let end = end.rsplit('…').next().unwrap_or_default();
            said.len() >= start.len() + end.len() && said.starts_with(start) && said.ends_with(end)
        }
    };
    match (expected.split_first(), said.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((&"…", rest)), _) => (0..=said.len()).any(|skipped| is_as(&said[skipped..], rest)),
        (Some((wanted, rest)), Some((line, others))) => line_is_as(line, wanted) && is_as(others, rest),
        (Some(_), None) => false,
    }
}

/// What three ports that follow each other begin with, when they end with 1, 2 and 3.
fn three_ports() -> u16 {
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let begins = (0..1000).map(|_| free_port() / 10);
    begins.into_iter().find(|begin| (1..=3).all(|end| is_free(begin * 10 + end))).expect("three free ports")
}

#[tokio::test]
async fn what_a_newcomer_types_does_what_it_says() {
    let consul = Consul::start().await;
    let (gateway, admin, servers) = (free_port(), free_port(), three_ports());
    let folder = scratch_folder("transcript");
    // Free ports instead of the usual ones, and a Consul that has such.
    let text = TRANSCRIPT
        .replace("consul agent -dev > consul.log 2>&1 &", "true")
        .replace(":8500", &format!(":{}", consul.address().port()))
        .replace(":8080", &format!(":{gateway}"))
        .replace(":9901", &format!(":{admin}"))
        .replace("900$n", &format!("{servers}$n"))
        .replace("900'$n'", &format!("{servers}'$n'"))
        .replace(
            "> [registries.consul]\n",
            &format!(
                "> listeners.main.address = \"127.0.0.1:{gateway}\"\n> admin.address = \"127.0.0.1:{admin}\"\n> [registries.consul]\n"
            ),
        );
    let commands = commands(&text);
    assert!(commands.len() > 12, "{commands:?}");
    let script: Vec<String> = commands.iter().map(|(command, _)| format!("{command}\necho '@@@'\n")).collect();
    let program = Path::new(env!("CARGO_BIN_EXE_portcullis")).parent().expect("a folder");
    let path = std::env::join_paths(
        [program.to_owned()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    );
    std::fs::write(folder.join("typed"), script.concat()).expect("a folder to write in");
    let said = std::fs::File::create(folder.join("said")).expect("a folder to write in");
    let shell = Command::new("bash")
        .arg("typed")
        .current_dir(&folder)
        .env("PATH", path.expect("a path"))
        .env_remove("SECRET")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(said.try_clone().expect("a second handle"))
        .stderr(said)
        .process_group(0)
        .spawn();
    let mut shell = Shell(shell.expect("bash"));
    for _ in 0..6000 {
        if shell.0.try_wait().expect("a shell").is_some() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let said = std::fs::read_to_string(folder.join("said")).expect("what was said").replace('\r', "");
    let answers: Vec<&str> = said.split("@@@\n").collect();
    let log = || {
        let log = std::fs::read_to_string(folder.join("gateway.log")).unwrap_or_default();
        log.lines().filter(|line| !line.contains(" access: ")).collect::<Vec<_>>().join("\n")
    };
    for (index, (command, expected)) in commands.iter().enumerate() {
        let said: Vec<&str> =
            answers.get(index).unwrap_or(&"nothing: it hangs, or did not come so far").lines().collect();
        assert!(
            is_as(&said, expected),
            "$ {command}\n{}\ninstead of\n{}\n{}",
            said.join("\n"),
            expected.join("\n"),
            log()
        );
    }
    drop(shell);
    let _ = std::fs::remove_dir_all(&folder);
}
