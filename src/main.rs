//! The `tilewright` program. What each subcommand does is the library's affair; `cli` reads flags and prints results.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
