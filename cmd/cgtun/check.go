package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"cgtun/config"
)

// runCheck reads a file and says nothing if it is good.
func runCheck(_ context.Context, c *call) error {
	path := c.config
	if path == "" {
		path = config.DefaultPath
	}
	if err := hideMemory(); err != nil {
		return err
	}
	_, err := config.Load(path, os.LookupEnv)
	return err
}

// runInit writes the example to the default path, never over a file.
func runInit(_ context.Context, c *call) error {
	return writeExample(config.DefaultPath, c)
}

func writeExample(path string, c *call) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make directory of the configuration: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already: it is left as it is", path)
	}
	if err != nil {
		return fmt.Errorf("write the example: %w", err)
	}
	_, err = f.WriteString(config.Example)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write the example: %w", err), os.Remove(path))
	}
	fmt.Fprintf(c.out, "%s written\n", path)
	return nil
}
