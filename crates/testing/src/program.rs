//! Programs that tests talk to: found on PATH, else unpacked from the system's package sources into the target folder.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// A program that can be started.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    libraries: Option<OsString>,
}

/// Finds `name` on PATH; else unpacks the Debian package `package`, from `suite` if one is given and from the machine's
/// own otherwise, with whatever it needs and the machine has not.
///
/// # Panics
///
/// With the reason, when neither works: a test that needs the program must fail, not pass.
pub fn find(name: &str, package: &str, suite: Option<&str>) -> Program {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    if let Some(program) = installed(name) {
        return program;
    }
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let root = target_folder().join("agents").join(package);
    if !root.exists() {
        eprintln!("`{name}` is not on PATH: unpacking the package `{package}` into {}", root.display());
        unpack(package, suite, &root).unwrap_or_else(|reason| {
            panic!("`{name}` is neither on PATH nor to be had from this system's package sources: {reason}")
        });
    }
    // Where a package has a script in usr/bin that starts it by its absolute path, the program itself goes first.
    let path = ["usr/lib/chromium", "usr/bin", "usr/sbin", "bin"]
        .iter()
        .map(|bin| root.join(bin).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| {
            panic!("the package `{package}` holds no program `{name}`; remove {} to try again", root.display())
        });
    let libraries = std::env::join_paths(library_folders(&root)).unwrap_or_default();
    Program { path, libraries: Some(libraries) }
}

/// The program of that name on PATH.
#[must_use]
pub fn installed(name: &str) -> Option<Program> {
    on_path(name).map(|path| Program { path, libraries: None })
}

impl Program {
    /// A command that runs it.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }
}

/// The folder cargo builds into, which the running test lies in.
#[must_use]
pub fn target_folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
        .map_or_else(std::env::temp_dir, Path::to_path_buf)
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Asks apt, with lists and cache of its own, what the package needs beyond what is installed, and unpacks that. Nothing
/// on the machine changes.
fn unpack(package: &str, suite: Option<&str>, root: &Path) -> Result<(), String> {
    let work = root.with_extension(format!("{}.part", std::process::id()));
    let apt = work.join("apt");
    for folder in ["state/lists/partial", "cache/archives/partial", "etc/sources", "etc/preferences"] {
        fs::create_dir_all(apt.join(folder)).map_err(|error| error.to_string())?;
    }
    let own = codename()?;
    let (line, archive) = machine_source(&own)?;
    let mut sources = format!("{line} {own} main\n");
    if let Some(suite) = suite {
        sources += &format!("{line} {suite} main\n");
        // The machine's own release goes first, so that only the package itself comes from the other one.
        let preference = format!("Package: *\nPin: release n={suite}\nPin-Priority: 100\n");
        fs::write(apt.join("etc/preferences/suite"), preference).map_err(|error| error.to_string())?;
    }
    fs::write(apt.join("etc/sources.list"), sources).map_err(|error| error.to_string())?;
    let options = [
        format!("Dir::State={}", apt.join("state").display()),
        "Dir::State::status=/var/lib/dpkg/status".to_owned(),
        format!("Dir::Cache={}", apt.join("cache").display()),
        format!("Dir::Etc::sourcelist={}", apt.join("etc/sources.list").display()),
        format!("Dir::Etc::sourceparts={}", apt.join("etc/sources").display()),
        format!("Dir::Etc::preferencesparts={}", apt.join("etc/preferences").display()),
        "APT::Sandbox::User=root".to_owned(),
        "APT::Install-Recommends=false".to_owned(),
        "APT::Get::List-Cleanup=0".to_owned(),
    ];
    let apt_get = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.current_dir(&work).args(options.iter().flat_map(|option| ["-o", option])).args(arguments);
        run(command, &archive)
    };
    apt_get(&["update", "-q"])?;
    let plan = apt_get(&["install", "--simulate", package])?;
    let mut needed: BTreeSet<&str> =
        plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split_whitespace().next()).collect();
    needed.insert(package);
    let mut download = vec!["download", "-q"];
    download.extend(&needed);
    apt_get(&download)?;
    let tree = work.join("tree");
    for file in fs::read_dir(&work).map_err(|error| error.to_string())?.flatten() {
        if file.path().extension().is_some_and(|extension| extension == "deb") {
            let mut command = Command::new("dpkg");
            command.arg("-x").arg(file.path()).arg(&tree);
            run(command, &archive)?;
        }
    }
    // Another process may have been quicker; its tree is as good.
    if fs::rename(&tree, root).is_err() && !root.exists() {
        return Err(format!("cannot move the unpacked package to {}", root.display()));
    }
    fs::remove_dir_all(&work).map_err(|error| error.to_string())
}

/// Runs to the end; the error is the last thing it said, without the archive's address.
fn run(mut command: Command, archive: &str) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.env("LC_ALL", "C").output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).replace(archive, "(the package archive)");
    Err(format!("{program} failed: {}", said.trim()))
}

fn codename() -> Result<String, String> {
    let release = fs::read_to_string("/etc/os-release").map_err(|_| "this is no Debian-like system".to_owned())?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned()).ok_or_else(|| "the system does not say its release".to_owned())
}

/// The start of a source line, and the address in it, for the archive this machine gets its own release from.
fn machine_source(codename: &str) -> Result<(String, String), String> {
    let mut files: Vec<PathBuf> = vec!["/etc/apt/sources.list".into()];
    files.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|file| file.path()));
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|text| one_line_source(&text, codename).or_else(|| stanza_source(&text, codename)))
        .ok_or_else(|| format!("no package source for {codename} is set up"))
}

/// `deb [options] uri suite components…`
fn one_line_source(text: &str, codename: &str) -> Option<(String, String)> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?;
        let (options, rest) = match rest.trim_start().strip_prefix('[') {
            Some(open) => open.split_once(']').map(|(options, rest)| (format!("[{options}] "), rest))?,
            None => (String::new(), rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        (suite == codename && words.any(|word| word == "main")).then(|| (format!("deb {options}{uri}"), uri.to_owned()))
    })
}

/// The `Types: deb` / `URIs:` / `Suites:` form.
fn stanza_source(text: &str, codename: &str) -> Option<(String, String)> {
    text.split("\n\n").find_map(|stanza| {
        let field =
            |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let has =
            |name: &str, word: &str| field(name).is_some_and(|words| words.split_whitespace().any(|have| have == word));
        if !(has("Types", "deb") && has("Suites", codename) && has("Components", "main")) {
            return None;
        }
        let uri = field("URIs")?.split_whitespace().next()?;
        let options = field("Signed-By")
            .filter(|key| key.starts_with('/'))
            .map_or(String::new(), |key| format!("[signed-by={key}] "));
        Some((format!("deb {options}{uri}"), uri.to_owned()))
    })
}

/// All folders with libraries, those of packages that keep some to themselves included.
fn library_folders(root: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let mut found = vec![root.join("usr/lib"), root.join("lib")];
    while let Some(folder) = found.pop() {
        let inside: Vec<PathBuf> =
            fs::read_dir(&folder).into_iter().flatten().flatten().map(|one| one.path()).collect();
        if inside.iter().any(|path| path.to_string_lossy().contains(".so")) {
            folders.push(folder);
        }
        found.extend(inside.into_iter().filter(|path| path.is_dir() && !path.is_symlink()));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_source_is_read_in_both_forms() {
        let stanza = "Types: deb\n# a snapshot\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                      Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n";
        let expected = (
            "deb [signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian".to_owned(),
            "http://mirror.example/debian".to_owned(),
        );
        assert_eq!(stanza_source(stanza, "bookworm"), Some(expected));
        assert_eq!(stanza_source(stanza, "trixie"), None);
        let line = "# deb http://no.example bookworm main\ndeb [arch=amd64] http://mirror.example/debian bookworm main contrib\n";
        let expected =
            ("deb [arch=amd64] http://mirror.example/debian".to_owned(), "http://mirror.example/debian".to_owned());
        assert_eq!(one_line_source(line, "bookworm"), Some(expected));
    }
}
