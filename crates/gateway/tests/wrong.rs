//! Wrong input: each gets a clear message and its exit code, from `run` as from `check`, and nothing is half started.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::process::Output;

use portcullis_testing::Backend;
use portcullis_testing::process::scratch_folder;

use common::{ALL, Program, file, log, program};

/// What the program says of a file, and its exit code.
fn says(command: &str, path: &Path) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = program(&[command, "--config"]).arg(path).output().expect("the program");
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

/// A sound file at free ports, and this besides.
fn with(more: &str) -> Vec<u8> {
    file(&[("a", &[([127, 0, 0, 1], 9).into()])], &format!("{ALL}{more}")).into_bytes()
}

#[test]
fn wrong_files_are_refused_before_anything_is_started() {
    let folder = scratch_folder("wrong-files");
    let pair = |name: &str| {
        let certified = rcgen::generate_simple_self_signed(vec![name.to_owned()]).expect("a certificate");
        (certified.cert.pem(), certified.signing_key.serialize_pem())
    };
    let ((certificate, key), (_, other)) = (pair("one.example"), pair("other.example"));
    for (name, text) in [
        ("cert.pem", certificate.as_str()),
        ("key.pem", &key),
        ("other.pem", &other),
        ("empty", ""),
        ("words", "words"),
    ] {
        std::fs::write(folder.join(name), text).expect("a folder to write in");
    }
    std::fs::create_dir(folder.join("folder")).expect("a folder to write in");
    let tls = |certificate: &str, key: &str| {
        with(&format!(
            "[listeners.tls]\naddress = \"127.0.0.1:0\"\ntls = {{ certificate = \"{certificate}\", key = \"{key}\" }}\n"
        ))
    };
    let provider = |says: &str| with(&format!("[auth.providers.p]\n{says}\n"));
    let nested = format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = format!("# {}\n", "x".repeat(5 << 20));
    let secret = "secret = { file = ";
    let wrong = [
        ("nothing", Vec::new(), "gateway.toml:1:1: the file is empty; begin with [services.<name>] and [[routes]]"),
        ("no text", b"\xff\xfe\0x".to_vec(), "cannot read it: it is not UTF-8"),
        ("too much", long.into_bytes(), "at most 4 MiB are read"),
        ("too deep", nested.into_bytes(), "not TOML: "),
        (
            "no service",
            with("[[routes]]\npath = \"/x\"\nto = \"b\"\n"),
            "there is no service \"b\"; did you mean \"a\"?",
        ),
        (
            "no registry",
            with("[services.b]\nregistry = \"consul\"\n"),
            "there is no registry \"consul\"; there is none",
        ),
        ("no limit", with("[limiter]\ndefault = \"each\"\n"), "there is no limit \"each\"; there is none"),
        (
            "a limit twice",
            with("[limits.a]\nrate = \"9/s\"\n[[routes]]\npath = \"/x\"\nto = \"a\"\nlimits = [\"a\", \"a\"]\n"),
            "\"a\" is named twice; remove one of them",
        ),
        ("no address", with("[listeners.b]\n"), "\"address\" is missing here; such as address = \"0.0.0.0:8080\""),
        ("no key", tls("cert.pem", "absent"), "absent: No such file or directory (os error 2); the path is relative"),
        ("a folder", tls("cert.pem", "folder"), "folder: Is a directory (os error 21); the path is relative"),
        ("an empty key", tls("cert.pem", "empty"), "there is no PRIVATE KEY in it; it must hold PEM"),
        ("words", tls("words", "key.pem"), "there is no CERTIFICATE in it; it must hold PEM"),
        ("another's key", tls("cert.pem", "other.pem"), "the key must be the certificate's own"),
        (
            "no secret",
            provider("secret = { env = \"PORTCULLIS_NO_SUCH\" }"),
            "PORTCULLIS_NO_SUCH is not set in the environment",
        ),
        ("an empty secret", provider(&format!("{secret}\"empty\" }}")), "the secret is empty or not text"),
        (
            "an endless secret",
            provider(&format!("{secret}\"/dev/zero\" }}")),
            "cannot read /dev/zero: it is larger than 16 MiB",
        ),
        ("no key set", provider("jwks = \"words\""), "not a key set"),
    ];
    let mut otherwise = Vec::new();
    let path = folder.join("gateway.toml");
    for (what, text, expected) in wrong {
        std::fs::write(&path, text).expect("a folder to write in");
        for command in ["check", "run"] {
            let (code, said) = says(command, &path);
            if code != Some(2) || !said.contains(expected) || said.contains("listening") || said.contains("panicked") {
                otherwise.push(format!("{command}, {what}: {code:?}\n{said}"));
            }
        }
    }
    for (path, expected) in [
        (Path::new("/dev/zero"), "at most 4 MiB are read"),
        (&folder, "cannot read it: Is a directory"),
        (&folder.join("absent.toml"), "cannot read it: No such file or directory"),
    ] {
        for command in ["check", "run"] {
            let (code, said) = says(command, path);
            if code != Some(2) || !said.contains(expected) {
                otherwise.push(format!("{command} {}: {code:?}\n{said}", path.display()));
            }
        }
    }
    assert!(otherwise.is_empty(), "{}", otherwise.join("\n"));
    let _ = std::fs::remove_dir_all(&folder);
}

#[test]
fn where_one_listener_cannot_be_none_is() {
    let folder = scratch_folder("wrong-ports");
    let path = folder.join("gateway.toml");
    let (free, taken) = (TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0").expect("a free port"));
    let free = free.and_then(|free| free.local_addr()).expect("a free port");
    let taken_at = taken.local_addr().expect("a bound socket");
    let run = |main: &str, other: &str, admin: &str| {
        let text = format!(
            "listeners.a.address = \"{main}\"\nlisteners.b.address = \"{other}\"\nadmin.address = \"{admin}\"\n\
             services.a.endpoints = \"127.0.0.1:9\"\n{ALL}"
        );
        std::fs::write(&path, text).expect("a folder to write in");
        says("run", &path)
    };
    for (main, other, admin, expected) in [
        (free.to_string(), taken_at.to_string(), "127.0.0.1:0".into(), "another program listens there"),
        (free.to_string(), "192.0.2.1:80".into(), "127.0.0.1:0".into(), "this machine has no such address"),
        (free.to_string(), "127.0.0.1:0".into(), taken_at.to_string(), "another program listens there"),
    ] {
        let (code, said) = run(&main, &other, &admin);
        assert!(code == Some(1) && said.contains(expected), "{code:?}: {said}");
        assert!(said.contains("cannot listen at") && !said.contains("listening at"), "{said}");
    }
    let _ = std::fs::remove_dir_all(&folder);
}

#[tokio::test]
async fn a_list_that_is_not_there_yet_is_waited_for() {
    let backend = Backend::start("one").await;
    let text =
        format!("registries.r = {{ kind = \"file\", path = \"instances.json\" }}\nservices.a.registry = \"r\"\n{ALL}");
    let program = Program::start(&file(&[], &text));
    assert_eq!(program.ask("/ready").await.text(), "not ready: nothing is known yet of a\n");
    assert_eq!((program.get("/").await.status.as_u16(), program.ask("/live").await.status.as_u16()), (503, 200));
    let write = |text: &str| {
        // All at once.
        std::fs::write(program.folder.join("new"), text).expect("a folder to write in");
        std::fs::rename(program.folder.join("new"), program.folder.join("instances.json"))
            .expect("a folder to write in");
    };
    write("{ \"services\": ");
    program.until("/state", |state| state.text().contains("the file cannot be understood")).await;
    assert_eq!(program.get("/").await.status, 503, "{}", log(&program.folder));
    write(&format!("{{ \"services\": {{ \"a\": [{{ \"address\": \"{}\" }}] }} }}", backend.address()));
    program.until("/ready", |answer| answer.status == 200).await;
    assert_eq!(program.get("/").await.header("x-backend"), "one");
}
