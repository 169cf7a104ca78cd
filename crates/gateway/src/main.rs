//! The program `portcullis`.

fn main() -> std::process::ExitCode {
    portcullis_gateway::main()
}
